"""How figures come from vLLM's workers to its Prometheus registry; imports vLLM, as `compat` does.

Workers have the figures; the engine core asks them once a second, without waiting, and sends the report with vLLM's own
`SchedulerStats` to the process that serves, where vLLM's Prometheus logger hands it on. Nothing of this runs for other
cache dtypes, or where `log_stats` is off.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from prometheus_client import REGISTRY
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import SchedulerStats

from . import figures, formats, metrics
from .compat import builders
from .metadata import KVarnMetadataBuilder
from .wrapping import wrap

INTERVAL_S = 1.0
"""Seconds between reports."""

_FIELD = "kvarn"
_logger = logging.getLogger("vllm.kvarn_rs")


def install() -> None:
    """Adds the report to vLLM's `SchedulerStats`, and what writes and reads it."""
    from vllm.v1.engine.core import EngineCore

    _add_field()
    wrap(EngineCore, "_initialize_kv_caches", _start_collector)
    wrap(PrometheusStatLogger, "__init__", _start_metrics)


def _add_field() -> None:
    """A field of the dataclass, which msgspec sends between processes as the others."""
    if hasattr(SchedulerStats, _FIELD):
        return
    field: Any = dataclasses.field(default=None)
    field.name = _FIELD
    field.type = dict[str, Any] | None
    field._field_type = vars(dataclasses)["_FIELD"]
    setattr(SchedulerStats, _FIELD, None)
    SchedulerStats.__annotations__[_FIELD] = field.type
    SchedulerStats.__dataclass_fields__[_FIELD] = field


# A worker.


def read_worker(worker: Any) -> figures.WorkerFigures:
    """Figures of a worker; called in its process."""
    runner = worker.model_runner
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (blocks.untyped_storage() for blocks in _tensors(runner.kv_caches))
    }
    block_bytes = sum(storages.values()) // runner.kv_cache_config.num_blocks
    found = (builder.group for _, builder in builders(runner, KVarnMetadataBuilder))
    return figures.of_worker([group for group in found if group is not None], block_bytes)


def _tensors(caches: Iterable[Any]) -> Iterable[torch.Tensor]:
    """The tensors of a runner's caches, of which those of state layers are lists."""
    for cache in caches:
        if isinstance(cache, torch.Tensor):
            yield cache
        else:
            yield from _tensors(cache)


# The engine core.


def _start_collector(original: Callable[..., Any], core: Any, *args: Any, **kwargs: Any) -> Any:
    """Reports after each step of this engine core. It chooses one of its two steps later on."""
    result = original(core, *args, **kwargs)
    if core.log_stats and formats.is_ours(core.vllm_config.cache_config.cache_dtype):
        collector = _Collector(core)
        for name in ("step", "step_with_batch_queue"):
            setattr(core, name, collector.after(getattr(core, name)))
    return result


class _Collector:
    """Asks an engine core's workers for their figures, and adds a report to the outputs of a step."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self._reporter = figures.Reporter()
        self._asked: Any = None
        self._due = 0.0
        self._failed = False

    def after(self, step: Callable[[], tuple[Any, bool]]) -> Callable[[], tuple[Any, bool]]:
        """A step that reports."""

        def step_and_report() -> tuple[Any, bool]:
            outputs, executed = step()
            if not self._failed:
                try:
                    self._collect()
                    self._send(outputs)
                except Exception:  # it would end the engine
                    self._failed = True
                    _logger.exception("kvarn-rs: no metrics from now on")
            return outputs, executed

        return step_and_report

    def _collect(self) -> None:
        """Asks when it is time, and takes answers that came with those of a step.

        When the last request has ended, the last step comes, in which workers release its pages. Nothing would wait
        for an answer after that one, so that it is waited for here.
        """
        scheduler, now = self._core.scheduler, time.monotonic()
        is_last = not scheduler.has_requests()
        if self._asked is not None and (is_last or self._asked.done()):
            self._take()
        if self._asked is None and (now >= self._due or not scheduler.has_unfinished_requests()):
            self._asked = self._core.model_executor.collective_rpc(read_worker, non_block=True)
            self._due = now + INTERVAL_S
            if is_last or self._asked.done():
                self._take()

    def _take(self) -> None:
        workers, self._asked = self._asked.result(), None
        pool = self._core.scheduler.kv_cache_manager.block_pool
        # vLLM keeps one block for itself.
        self._reporter.update(workers, pool.num_gpu_blocks - 1, pool.get_num_free_blocks())

    def _send(self, outputs: Any) -> None:
        """One output of a step has vLLM's figures."""
        stats = [output.scheduler_stats for output in (outputs or {}).values() if output.scheduler_stats is not None]
        if stats:
            setattr(stats[0], _FIELD, self._reporter.take())


# The process that serves.


def _start_metrics(original: Any, stat_logger: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    """Adds the metrics to a logger of vLLM's; removes those of an earlier engine in this process, as vLLM does."""
    original(stat_logger, vllm_config, *args, **kwargs)
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith(metrics.PREFIX):
            REGISTRY.unregister(collector)
    if not formats.is_ours(vllm_config.cache_config.cache_dtype):
        return
    ours = metrics.Metrics(
        stat_logger._gauge_cls,
        stat_logger._counter_cls,
        vllm_config.model_config.served_model_name,
        stat_logger.engine_indexes,
    )
    record = stat_logger.record

    def record_both(scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
        record(scheduler_stats, *args, **kwargs)
        report = getattr(scheduler_stats, _FIELD, None)
        if report is not None:
            ours.record(report, kwargs.get("engine_idx", 0))

    stat_logger.record = record_both
