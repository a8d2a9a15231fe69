"""The average of adapted weights: in single precision, and put into the layers only while it predicts."""

import torch
from small_lora import X, make, stirred, tiny_vit

from clplat.adapters import WeightAverage


def test_an_average_of_half_precision_weights_keeps_small_steps():
    backbone, lora = make("ffn", tiny_vit().bfloat16().requires_grad_(False))
    lora.add("a")
    lora.use("a", train="a")
    average = WeightAverage(lora, 0.9999)
    average.grow()
    plain = [layer.weight.clone() for layer in lora.base_layers().values()]
    average.update()  # B = 0: the weights as they are
    stirred(lora, "a")
    average.update()
    for slow, weight, change in zip(average.weights, plain, lora.delta("a").values(), strict=True):
        assert slow.dtype == torch.float32
        expected = weight.double() + 1e-4 * change.double()  # a step of bfloat16 is larger
        torch.testing.assert_close(slow.double(), expected, atol=1e-6, rtol=1e-6)
        assert not torch.equal(slow, weight.float())
    before = {name: t.clone() for name, t in backbone.state_dict().items()}
    with average.applied(), torch.no_grad():
        assert backbone(X.bfloat16()).isfinite().all()
        for slow, layer in zip(average.weights, lora.base_layers().values(), strict=True):
            assert torch.equal(layer.weight, slow.bfloat16())
    assert lora.active == ("a",)
    assert all(torch.equal(t, before[name]) for name, t in backbone.state_dict().items())
