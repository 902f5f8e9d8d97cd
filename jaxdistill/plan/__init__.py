"""The real step, compiled for devices that need not be here."""

from jaxdistill.plan.ahead import abstract_arguments, compile_ahead, topology_devices

__all__ = ["abstract_arguments", "compile_ahead", "topology_devices"]
