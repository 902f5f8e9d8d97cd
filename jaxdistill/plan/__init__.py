"""What a run would need and take on devices that need not be here: by formula, and from the real step compiled for them."""

from jaxdistill.plan.ahead import abstract_arguments, compile_ahead, stay_on_the_host, topology_devices
from jaxdistill.plan.estimate import argument_bytes, flops_per_token, tokens_per_step
from jaxdistill.plan.plan import Plan, plan_run, show_plan
from jaxdistill.plan.tables import chips_table, kernel_table, memory_table
from jaxdistill.plan.topology import Topology, parse_topology

__all__ = [
    "Plan",
    "Topology",
    "abstract_arguments",
    "argument_bytes",
    "chips_table",
    "compile_ahead",
    "flops_per_token",
    "kernel_table",
    "memory_table",
    "parse_topology",
    "plan_run",
    "show_plan",
    "stay_on_the_host",
    "tokens_per_step",
    "topology_devices",
]
