"""Golden-section search."""

from stepfold.maths.golden import golden_section


def test_golden_section_finds_a_minimum() -> None:
    tried: list[float] = []
    place, value = golden_section(0.0, 1.0, lambda x: (tried.append(x), (x - 0.3) ** 2)[1], 8)
    assert len(tried) == 8 and abs(place - 0.3) < 0.03 and value == (place - 0.3) ** 2
