"""How far the service scales: what one job, one worker and one waiting row cost each part of it.

python -m benchmarks.scale [--quick] [--write]
"""
