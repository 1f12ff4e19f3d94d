"""What hosts share, agree on and are told, without starting any."""

import hashlib
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath

from quantizable_flax.checkpoint import resume
from quantizable_flax.data.share import Share
from quantizable_flax.errors import UserError
from quantizable_flax.runtime import hosts as distributed
from quantizable_flax.runtime.mesh import AXES, batch_share


def mesh(shape: tuple[int, ...], hosts: list[int]):
    """A mesh of devices of which only the host is known, in their order."""
    devices = np.array([SimpleNamespace(process_index=host) for host in hosts], dtype=object)
    data, fsdp, tensor = shape
    shape = (data, fsdp, 1, tensor)  # a sequence axis splits no batch
    sizes = dict(zip(AXES, shape, strict=True))
    return SimpleNamespace(axis_names=AXES, shape=sizes, devices=devices.reshape(shape))


@pytest.mark.parametrize(
    ("shape", "hosts", "parts"),
    [
        ((4, 1, 1), [0, 0, 1, 1], {0: (0, 1), 1: (2, 3)}),
        ((2, 2, 1), [0, 0, 1, 1], {0: (0, 1), 1: (2, 3)}),
        ((2, 1, 2), [0, 0, 1, 1], {0: (0,), 1: (1,)}),
        # The model is split over both hosts: they hold the same examples.
        ((1, 1, 4), [0, 0, 1, 1], {0: (0,), 1: (0,)}),
        ((2, 1, 2), [0, 1, 0, 1], {0: (0, 1), 1: (0, 1)}),
        # Hosts whose devices do not follow each other, as on a TPU slice.
        ((4, 1, 1), [0, 1, 0, 1], {0: (0, 2), 1: (1, 3)}),
    ],
)
def test_a_host_reads_what_its_devices_hold(shape, hosts, parts):
    count = shape[0] * shape[1]
    for host, held in parts.items():
        # Past the cache: these meshes have no hash that counts.
        assert batch_share.__wrapped__(mesh(shape, hosts), host) == Share(held, count)


def test_rows_of_a_share():
    assert Share((0, 2), 4).rows(8).tolist() == [0, 1, 4, 5]
    assert Share((1,), 2).rows(6).tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("host", 2, 0, 5), "--coordinator must be HOST:PORT, found 'host'"),
        ((":80", 2, 0, 5), "--coordinator must be HOST:PORT"),
        (("host:80", 0, 0, 5), "--num_processes must be at least 1, found 0"),
        (("host:80", 2, 2, 5), "--process_id must be from 0 to --num_processes - 1, found 2 of 2"),
        (("host:80", 2, 1, 0), "--coordinator_timeout must be at least 1, found 0"),
        ((None, 2, 1, 5), "found no --coordinator: give all three"),
        (("host:80", None, None, 5), "found no --num_processes and no --process_id"),
    ],
)
def test_flags_that_name_no_hosts(monkeypatch, flags, sentence):
    def initialize(coordinator, num_processes, process_id, **_):  # as JAX without a cluster
        if coordinator is None:
            raise ValueError("coordinator_address should be defined.")
        raise ValueError("Number of processes must be defined.")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=sentence):
        distributed._join(*flags)


def test_one_process_joins_nothing(monkeypatch):
    def initialize(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", initialize)
    assert not distributed._join(None, None, None, 5)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", None)
    assert not distributed._join(None, 1, None, 5)


def test_a_cluster_that_cannot_be_read_is_one_sentence(monkeypatch):
    def initialize(*_, **__):
        raise RuntimeError("pod qf-0 does not have a controller.\nmore")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=r"does not have a controller\.\).*--num_processes=1"):
        distributed._join(None, None, None, 5)


def of_all(monkeypatch, *others) -> None:
    """Lets other processes add their values to everything that is gathered."""
    library = distributed.multihost_utils
    monkeypatch.setattr(library, "process_allgather", lambda value: np.stack([value, *others]))
    monkeypatch.setattr(library, "broadcast_one_to_all", lambda value: value)
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 1 + len(others))


@pytest.fixture
def run(tmp_path):
    for step in (10, 20):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    return epath.Path(tmp_path)


def test_what_another_host_cannot_read_is_damaged(run, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)

    def read(step):
        of_all(monkeypatch, 0, 2 if step == 20 else 0)
        return f"step {step}"

    assert resume.newest_readable(run, read) == (10, "step 10", [20])
    (warning,) = caplog.messages
    assert all(part in warning for part in ("step 20", "process 2", "step 10"))


def test_what_another_host_refuses_is_refused(run, monkeypatch):
    def read(step):
        of_all(monkeypatch, 1)
        return step

    with pytest.raises(UserError, match="process 1 refused the checkpoint of step 20"):
        resume.newest_readable(run, read)


def test_contents_that_differ_are_named(monkeypatch):
    distributed.check_same("the text", b"a", "copy it")
    same, other = (
        np.frombuffer(hashlib.blake2b(content, digest_size=16).digest(), np.int32)
        for content in (b"a", b"b")
    )
    of_all(monkeypatch, same, other)
    with pytest.raises(UserError, match="found others on process 2 than on process 0: copy it"):
        distributed.check_same("the text", b"a", "copy it")
