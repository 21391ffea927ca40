"""Random numbers belong to samples and episodes, regardless of other computations."""

from __future__ import annotations

import torch

from fibopolicy.policies.rng import GLOBAL_RNG, EpisodeRng, SampleRng


def test_random_numbers_belong_to_samples() -> None:
    cpu = torch.device("cpu")

    def numbers(start: int, count: int) -> list[torch.Tensor]:
        rng = SampleRng(torch.Generator().manual_seed(3), batch_size=8, start=start)
        return [
            rng.rand(count, 2, device=cpu),
            rng.randn(count, 2, 3, device=cpu),
            rng.randint(-4, 5, count, 1, device=cpu),
        ]

    whole = numbers(0, 8)
    for first, second in zip(*(numbers(start, 4) for start in (0, 4)), strict=True):
        assert torch.equal(torch.cat([first, second]), whole.pop(0))
    torch.manual_seed(3)
    unsplit = GLOBAL_RNG.rand(8, 2, device=cpu)
    torch.manual_seed(3)
    assert torch.equal(unsplit, torch.rand(8, 2))


def observations(rows: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (rows, 1, 4, 4, 3), dtype=torch.uint8, generator=generator)
    return {"image": image, "hand": torch.rand(rows, 1, 3, generator=generator).to(dtype)}


def test_an_episode_has_the_same_numbers_alone_and_beside_others() -> None:
    obs, keys = observations(4), ("image", "hand")
    together = EpisodeRng.init(obs, keys)
    alone = EpisodeRng.init({key: value[2:3] for key, value in obs.items()}, keys)
    for _ in range(3):
        torch.manual_seed(5)  # changes nothing
        assert torch.equal(together.randn(6, 2)[2], alone.randn(6, 2)[0])
        together, alone = together.advance(), alone.advance()
    assert torch.equal(EpisodeRng(**alone.state).randn(3), alone.randn(3))


def test_numbers_differ_between_episodes_and_between_decisions() -> None:
    rng = EpisodeRng.init(observations(2), ("image", "hand"))
    first, second = rng.randn(5), rng.advance().randn(5)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])


def test_equal_observations_of_another_dtype_or_order_give_the_same_numbers() -> None:
    single, double = observations(2), observations(2, torch.float64)
    expected = EpisodeRng.init(single, ("image", "hand")).randn(5)
    assert torch.equal(EpisodeRng.init(double, ("hand", "image")).randn(5), expected)
