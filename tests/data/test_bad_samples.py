"""The budget of bad samples, counted by hand."""

import numpy as np
import pytest

from m3i_large.data.bad_samples import BadSampleLedger
from m3i_large.data.config import BadSampleBudget
from m3i_large.data.producer import BadSample
from m3i_large.errors import UserError


def bad(source: str, number: int, *, reason: str = "cut") -> BadSample:
    return BadSample(source=source, shard=f"{source}-0.tar", key=f"k{number}", id=number, reason=reason, step=0)


def ledger(**budget: float) -> BadSampleLedger:
    return BadSampleLedger(BadSampleBudget(**({"share": 1.0, "window": 10, "in_a_row": 100} | budget)), ["a", "b"])


def count(ledger: BadSampleLedger, rows: str) -> None:
    """One micro-batch: "a" and "b" are good rows of the sources, "A" and "B" replaced ones."""
    source = np.array(["ab".index(c.lower()) for c in rows], np.int64)
    substitute = np.array([int(c.isupper()) for c in rows], np.int64)
    ledger.count(source, substitute, [bad(c.lower(), i) for i, c in enumerate(rows) if c.isupper()])


def test_the_share_is_of_the_last_samples_of_each_source() -> None:
    counted = ledger(share=0.2)
    count(counted, "AaBbbbb")
    counted.check()
    count(counted, "A")
    counted.check()  # 2 of 3, and 2 are allowed of 10
    count(counted, "A")
    message = (
        r"^source a: 3 of the last 4 samples could not be used; needed: at most 2 \(share\), of data\.bad_samples\. "
        r"The last one: k0 of a-0\.tar: cut$"
    )
    with pytest.raises(UserError, match=message):
        counted.check()


def test_the_window_slides_sample_by_sample() -> None:
    counted = ledger(share=0.2)
    count(counted, "AA" + "a" * 8 + "b" * 50)
    counted.check()
    count(counted, "A")  # the first has left: samples 2 to 11 hold two
    counted.check()
    count(counted, "A")  # and the second: 3 to 12
    counted.check()
    count(counted, "a" * 6)
    count(counted, "A")  # samples 10 to 19 hold 11, 12 and 19
    with pytest.raises(UserError, match="3 of the last 10 samples"):
        counted.check()


def test_the_limit_in_whole_samples_is_exact() -> None:
    for share, window, most in [(0.29, 100, 29), (0.01, 150, 1), (0.0, 10, 0), (1 / 3, 9, 2), (1.0, 5, 5)]:
        counted = ledger(share=share, window=window)
        for number in range(1, most + 2):
            count(counted, "A")
            if number <= most or share == 1.0:
                counted.check()
            else:
                with pytest.raises(UserError, match=rf"needed: at most {most} \(share\)"):
                    counted.check()


def test_samples_in_a_row_are_of_one_source_across_batches() -> None:
    counted = ledger(in_a_row=3)
    count(counted, "AbAb")
    counted.check()
    count(counted, "aAA")
    counted.check()
    count(counted, "bBb")
    counted.check()
    count(counted, "A")
    message = r"^source a: 3 samples in a row could not be used; needed: below 3 \(in_a_row\).* k0 of a-0\.tar: cut$"
    with pytest.raises(UserError, match=message):
        counted.check()


def test_a_row_that_ended_within_the_batch_still_counts_and_counting_never_raises() -> None:
    """All that was bad can be told before the run stops."""
    counted = ledger(in_a_row=3, share=0.0)
    count(counted, "AAAAaaa")
    with pytest.raises(UserError, match="4 samples in a row"):
        counted.check()


def test_the_last_bad_sample_of_the_source_at_fault_is_named() -> None:
    counted = ledger(share=0.1)
    source, substitute = np.array([1, 0, 1]), np.array([3, 1, 1])
    counted.count(source, substitute, [bad("b", 4), bad("a", 5), bad("b", 6, reason="grey"), bad("b", 7)])
    with pytest.raises(UserError, match=r"source b: 2 of the last 2 .* The last one: k7 of b-0\.tar: cut"):
        counted.check()
