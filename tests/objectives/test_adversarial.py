import pytest
import torch

from stepfold.objectives.adversarial import AROUND, Around, Discriminator, discriminator_loss, generator_loss

WIDTHS = (6, 6, 8)


def features(num: int, shift: float = 0.0) -> list[torch.Tensor]:
    return [torch.randn(num, 5, width) + shift * torch.linspace(-1, 1, width) for width in WIDTHS]


def test_the_hinge_losses_by_hand():
    real, fake = torch.tensor([[0.5, 2.0], [-1.0, 1.0]]), torch.tensor([[-3.0, 0.0], [0.25, -0.25]])
    assert discriminator_loss(real, fake).tolist() == [(0.5 + 0) / 2 + (0 + 1) / 2, (2 + 0) / 2 + (1.25 + 0.75) / 2]
    assert generator_loss(fake).tolist() == [1.5, 0.0]


def test_heads_that_know_nothing_lose_two():
    nothing = torch.zeros(3, 7)
    assert discriminator_loss(nothing, nothing).tolist() == [2.0] * 3


def test_every_token_of_every_map_has_a_logit_and_rows_do_not_mix():
    discriminator = Discriminator(WIDTHS).eval()
    maps = features(4)
    logits = discriminator(maps)
    assert logits.shape == (4, 3 * 5)
    alone = discriminator([m[2:3] for m in maps])
    torch.testing.assert_close(logits[2:3], alone)
    maps[1][2] = torch.randn(5, 6)  # the second map's tokens are logits 5 to 9 of row 2
    changed = (discriminator(maps) - logits).abs() > 1e-6
    assert changed[2, 5:10].any() and not changed[[0, 1, 3]].any() and not changed[2, :5].any()


def test_features_of_a_teacher_in_half_precision_are_judged():
    heads = Discriminator((8,)).eval()  # in training each call moves the spectral norm
    maps = torch.randn(3, 5, 8).bfloat16()
    assert torch.equal(heads([maps]), heads([maps.float()])) and heads([maps]).dtype == torch.float32


def test_a_wrong_number_of_maps_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        Discriminator(WIDTHS)(features(2)[:2])


def test_heads_learn_to_tell_two_kinds_apart_and_not_what_is_the_same():
    discriminator = Discriminator(WIDTHS)
    optimiser = torch.optim.AdamW(discriminator.parameters(), lr=1e-2)
    for _ in range(100):
        optimiser.zero_grad()
        discriminator_loss(discriminator(features(16, 2.0)), discriminator(features(16))).mean().backward()
        optimiser.step()
    with torch.no_grad():
        apart = discriminator_loss(discriminator(features(64, 2.0)), discriminator(features(64))).mean()
        same = discriminator_loss(discriminator(features(64)), discriminator(features(64))).mean()
    assert apart < 1.0
    assert same > 1.8


def test_no_layer_has_a_gain_above_one():
    discriminator = Discriminator(WIDTHS)
    with torch.no_grad():
        for _ in range(50):  # power iterations, one a call in training
            discriminator(features(2))
        layers = [m for m in discriminator.modules() if isinstance(m, torch.nn.Linear)]
        norms = torch.stack([torch.linalg.matrix_norm(layer.weight, ord=2) for layer in layers])
    assert torch.allclose(norms, torch.ones(9), atol=1e-3)


def test_a_head_with_neighbours_sees_those_around_a_token_and_no_others():
    for neighbours, reach in ((False, 0), (True, 2 * (AROUND // 2))):
        discriminator = Discriminator((6,), neighbours).eval()
        tokens = torch.randn(2, 40, 6)
        before = discriminator([tokens])
        tokens[0, 20] += torch.randn(6)
        changed = ((discriminator([tokens]) - before).abs() > 1e-7).nonzero()
        assert changed[:, 0].unique().tolist() == [0]
        assert {abs(place - 20) for place in changed[:, 1].tolist()} == set(range(reach + 1))


def test_what_sees_around_has_no_gain_above_one():
    around = Around(4)
    with torch.no_grad():
        around.across.bias.zero_()
        for _ in range(50):
            around(torch.randn(1, 30, 4))
        units = torch.eye(120).reshape(120, 30, 4)
        gain = torch.linalg.matrix_norm(around.eval()(units).flatten(1), ord=2)
    assert 0.3 < gain <= 1 + 1e-4
