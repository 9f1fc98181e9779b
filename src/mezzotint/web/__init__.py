"""The studio: one page on 127.0.0.1 to sample from models, watch runs and look inside networks.

Reading order: `studio` (models, runs and limits), `request` (a form becomes a sampling job),
`streaming` (previews while it samples), `html` (images and text as HTML), the four tabs, and last
`app`, which puts them together.

No component of the page takes or returns a file. Images travel inside the page, so a visitor can
name no path.
"""
