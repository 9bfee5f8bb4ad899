"""Peaks are counted on allocations: known sizes give known peaks, and what was there before does not count."""

import torch

from laddpo.hardware.measuring import peak_bytes, resident_bytes, stored_bytes

MEGABYTE = 250_000  # float32 elements in a million bytes


def test_the_peak_is_that_of_what_lives_at_one_time():
    def work():
        a = torch.zeros(MEGABYTE)
        b = a + 1  # 2 MB live
        del a
        c = b * 2  # 2 MB live
        del b, c
        torch.zeros(MEGABYTE)

    with peak_bytes("cpu") as peak:
        work()
    assert 2_000_000 <= peak.above < 2_001_000


def test_temporaries_inside_an_operation_count():
    """logsumexp makes a copy as large as its input, which no tensor of ours ever holds."""
    x = torch.zeros(1000, 1000)
    with peak_bytes("cpu") as peak:
        x.logsumexp(-1)
    assert 4_000_000 <= peak.above < 4_100_000


def test_what_was_there_before_does_not_count_and_views_cost_nothing():
    x = torch.zeros(MEGABYTE)
    with peak_bytes("cpu") as peak:
        y = x[:10].view(2, 5)
    assert peak.above < 1000 and y.shape == (2, 5)


def test_two_blocks_do_not_disturb_one_another(capfd):
    with peak_bytes("cpu") as first:
        torch.zeros(MEGABYTE)
    with peak_bytes("cpu") as second:
        torch.zeros(2 * MEGABYTE)
    assert 1_000_000 <= first.above < 1_001_000 and 2_000_000 <= second.above < 2_001_000
    assert capfd.readouterr().err == "", "the profiler announces itself"


def test_stored_bytes_count_a_shared_storage_once():
    x = torch.zeros(10, dtype=torch.float64)
    assert stored_bytes([x, x[:3], x.view(2, 5)]) == 80


def test_resident_bytes_are_weights_gradients_and_optimizer_state():
    layer = torch.nn.Linear(10, 10)  # 110 parameters
    optimizer = torch.optim.AdamW(layer.parameters())
    assert resident_bytes(layer, optimizer) == 440
    layer(torch.ones(1, 10)).sum().backward()
    assert resident_bytes(layer, optimizer) == 880
    optimizer.step()
    assert resident_bytes(layer, optimizer) == 4 * 440 + 2 * 4  # two moments; a step counter for each tensor
