"""Where client code runs; ``--engine`` picks one. All give the same results."""

from __future__ import annotations


def make_engine(worker, partition, states: dict[int, dict], args, say=print):
    """The engine that ``args.engine`` names; only its own file is imported.

    Args:
        worker, partition, states, args: see ``federated.engines.base.Engine``. say: prints a line for the reader.

    Raises:
        UserError: settings that the engine cannot meet (Ray is not installed, too few GPUs).
    """
    if args.engine == "batched":
        from federated.engines.batched import BatchedEngine

        return BatchedEngine(worker, partition, states, args, say)
    if args.engine == "ray":
        from federated.engines.ray import RayEngine

        return RayEngine(worker, partition, states, args, say)
    from federated.engines.serial import SerialEngine

    return SerialEngine(worker, partition, states, args)
