"""The studio: one page on 127.0.0.1 to sample from models, watch runs and see what the mathematics does.

Read `studio` (what a visitor may ask for), `wish` (a form becomes a job), `burning` (pictures while they are made),
`markup` (pictures and plots as HTML), the four tabs, and last `page`, which puts them together. No component of the
page takes or gives a file: pictures travel inside the page, so there is no path that a visitor could name.
"""
