"""Performance cases, peers, runner, verdicts, static and traffic suites, reports."""
