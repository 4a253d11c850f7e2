"""The cheapest variant within a quality budget: search space, proxies, trials and the search."""
