"""What a result depends on besides the code."""

import pytest
import torch

from mezzotint.core.distributed import init_distributed
from mezzotint.core.machine import describe_machine, use_full_float32
from mezzotint.models import open_model


@pytest.fixture
def tf32():
    """Let products and convolutions use TF32 until the end of the test."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize(
    "start", [use_full_float32, init_distributed, lambda: open_model("eurosat-64")]
)
def test_tf32_is_off_in_products_and_convolutions(start, tf32):
    assert describe_machine("cpu")["float32_matmul_precision"] == "high"
    start()
    assert describe_machine("cpu")["float32_matmul_precision"] == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
