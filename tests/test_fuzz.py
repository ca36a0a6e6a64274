"""No decoder crashes on what it is fed: the corpus of `bench/fuzz.py`, and what hypothesis makes of examples."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.fuzz import TARGETS, examples, feed, kept

SOME = 60  # of hypothesis's inputs, of each kind


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_ends_in_promised_errors_only(target: str) -> None:
    """Each input that ever reached new code, or ended the fuzzer, is decoded or refused by an error of ours."""
    inputs = [*examples(target), *kept(target)]

    assert len(inputs) > 2
    for data in inputs:
        feed(target, data)


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=SOME, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_changed_examples_end_in_promised_errors_only(target: str, data: st.DataObject) -> None:
    """An example with some of its bytes changed, cut out or put in is decoded or refused by an error of ours."""
    whole = bytearray(data.draw(st.sampled_from(examples(target))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole)))
        whole[at : at + data.draw(st.sampled_from([0, 1, 8, 64]))] = data.draw(st.binary(max_size=9))

    feed(target, bytes(whole))


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=SOME, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.binary(max_size=300))
def test_any_bytes_end_in_promised_errors_only(target: str, data: bytes) -> None:
    """Bytes that nothing of ours wrote are refused by an error of ours."""
    feed(target, data)
