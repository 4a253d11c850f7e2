"""Speed and cost: workloads, engines, per-request samples, figures and the cost ledger."""
