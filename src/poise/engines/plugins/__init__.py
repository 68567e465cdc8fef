"""poise behind engines' own load balancers: the planner on their arrays, one plugin an engine."""
