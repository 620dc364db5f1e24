"""Fault tests: runs that are killed, damaged and starved, and must not lose anything.

`bash scripts/faults.sh` prints what was tried, survived and lost; docs/reliability.md explains it.
"""
