"""Parameters and multiply-accumulates of the published sizes, against their papers and specs."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mezzotint.tools import count

# name -> (parameters, GMAC); DiffiT's parameters are printed in thousands, all others exactly.
EXACT = {
    "dimr-m-3r-64": (132_828_681, 53.53),
    "dimr-l-3r-64": (284_138_505, 110.60),
    "dimr-xl-2r-256": (505_046_408, 160.18),
    "dimr-g-2r-256": (1_056_352_904, 331.10),
    "dimr-xl-3r-512": (525_027_372, 206.07),
    "diffit-256": (561_330_000, 118.507),
    "diffit-512": (563_562_000, 524.424),
}


@pytest.mark.parametrize("preset", EXACT)
def test_published_counts(preset):
    params, gmac = EXACT[preset]
    row = count.count_preset(preset)
    assert row["params"] == params if params % 1000 else round(row["params"], -3) == params
    digits = 3 if preset.startswith("diffit") else 2
    assert round(row["gmac"], digits) == gmac


def test_diffit_split_of_the_paper():
    row = count.count_preset("diffit-256")
    assert round(row["gmac"] - row["gmac_attention"], 3) == 114.279  # what the paper calls 114 G
    net = count.meta_backbone("diffit-256")
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 561_035_232
    width = net.config.width
    dead = net.temporal.weight[2 * net.config.depth * width :].numel() + net.config.depth * width
    assert round(dead / 1e6, 2) == 37.19
    assert row["gmac_skipped"] == net.config.depth * width**2 / 1e9


def test_diffit_image_is_near_the_open_reading():
    # specs/diffit.md section 4: 44.8 M with concatenated skips and 4 cells everywhere, and with
    # temporal keys.
    row = count.count_preset("diffit-ffhq64")
    net = count.meta_backbone("diffit-ffhq64")
    keys = sum(net.config.time_width * w + w for w in net.terms)
    assert round((row["params"] + keys) / 1e6, 1) == pytest.approx(44.8, abs=0.15)
    assert row["gmac"] == pytest.approx(32.2, abs=0.05)


@pytest.mark.parametrize(("preset", "gmac"), [("sid2-128", 137.44), ("sid2-256-flop", 652.84)])
def test_sid2_blocks(preset, gmac):
    rows = count.count_layers(preset)
    blocks = sum(r["gmac"] for r in rows if "block" in r["module"].lower())
    assert blocks == pytest.approx(gmac, rel=0.005)


def test_uvit_is_two_and_a_half_billion():
    row = count.count_preset("uvit-128")
    assert 2.44e9 < row["params"] < 2.48e9
    assert 546 <= row["gmac"] <= 561


def test_fused_attention_is_counted_on_the_meta_device():
    q = torch.empty(2, 3, 5, 8, device="meta")
    with FlopCounterMode(display=False) as counter:
        F.scaled_dot_product_attention(q, q, q, attn_mask=torch.empty(1, 3, 5, 5, device="meta"))
    assert counter.get_total_flops() == 2 * 2 * (2 * 3 * 5 * 5 * 8)
