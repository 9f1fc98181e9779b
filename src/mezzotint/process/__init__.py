"""The mathematics of mezzotint; torch only. Read this page first.

One image x, one noise eps of the same shape, and one number per image, the log-SNR l (`logsnr`,
natural logarithm):

    alpha^2 = sigmoid(l)        sigma^2 = sigmoid(-l)        z = alpha x + sigma eps

l falls from about +15 (clean) to about -15 (noise). The state z is always variance preserving; the
sigma of EDM, the step of DDPM and the t of flow matching are coordinates of l; each is converted in
one place.

Everything a network may predict is a row (a, b):  F = a x + b eps.  With the row (alpha, sigma) of
z that is two equations in two unknowns: one 2x2 solve is every conversion, a x + b eps is every
regression target (`prediction`).

Three things stay apart: what F means (`kind`), the number that the network gets as its noise level
(`noise`), and how its input is scaled (`scale`). Together they are a `Parameterisation`; with a
backbone they make a `Model`, and a Model is a `Denoiser`: (z, l, cond) -> (x, eps). Samplers and
guidance use nothing else (`denoiser`).

A schedule is a quantile function u -> l, decreasing, u = 0 clean and u = 1 noise. Uniform u is the
training distribution, even u a sampling grid (`schedules`). A sampler is a function (denoiser, z,
grid, cond) -> image, its grid a rising sequence of log-SNRs that may end in +inf (`samplers`). An
objective is a function (model, x, eps, l, cond) -> loss per image (`objectives`). Guidance and
clipping take a denoiser and return one (`guidance`).
"""
