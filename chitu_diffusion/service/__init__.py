"""The service: jobs in SQL, leases, and what is built on them. Nothing of `chitu generate` imports it."""
