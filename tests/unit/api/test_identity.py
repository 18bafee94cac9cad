from __future__ import annotations

import pytest
import torch
from torch import nn

from kecore.api import identity as identity_module
from kecore.api.identity import Fingerprint, Identity


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))


def test_equal_weights_have_equal_fingerprints_and_one_bit_makes_another() -> None:
    a, b = model(), model()
    assert Identity(a).of() == Identity(b).of()
    bits = b[1].weight.data.view(torch.int32)
    bits[0, 0] ^= 1
    assert Identity(a).of() != Identity(b).of()
    assert Identity(a).of(keep=lambda name: name != "1.weight") == Identity(b).of(keep=lambda name: name != "1.weight")


def test_shape_and_name_count() -> None:
    a, b = nn.Linear(2, 8, bias=False), nn.Linear(8, 2, bias=False)
    b.weight.data = a.weight.data.reshape(2, 8)
    assert Identity(a).of() != Identity(b).of()
    renamed = nn.Sequential(a)
    assert Identity(a).of() != Identity(renamed).of()


def test_memory_layout_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
    b.weight.data = a.weight.data.t().contiguous().t()
    whole = Identity(a).of()
    assert Identity(b).of() == whole
    monkeypatch.setattr(identity_module, "_CHUNK", 5)  # pieces of a large tensor
    assert Identity(a).of() == whole


def test_fingerprint_knows_a_cast_of_the_same_base_and_no_other() -> None:
    base = model()
    fingerprint = Fingerprint.of(Identity(base), torch.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert fingerprint.differs(Identity(model().to(dtype)), dtype) == ""
    message = fingerprint.differs(Identity(model(1)), torch.float32)
    assert fingerprint.digests["float32"][:12] in message
    assert "(float32)" in message
    unknown = fingerprint.differs(Identity(model().double()), torch.float64)
    assert unknown == "kept for weights in float32, bfloat16, float16, got weights in float64"


def test_a_bfloat16_base_is_not_taken_for_float32_weights_that_round_to_it() -> None:
    base = model()
    rounded = Fingerprint.of(Identity(model().bfloat16()), torch.bfloat16)
    assert rounded.differs(Identity(base), torch.float32) != ""
    assert rounded.differs(Identity(base.bfloat16()), torch.bfloat16) == ""
