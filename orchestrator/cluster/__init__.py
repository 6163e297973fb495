"""Ray clusters: join or start a cluster, check nodes, submit jobs."""

from orchestrator.cluster.node_checks import refuse_unfit_machine, refuse_unfit_nodes
from orchestrator.cluster.session import ray_session
