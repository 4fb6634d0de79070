"""What a job costs beside its text: codeherd's queue, store and worker with a null engine, and its peers.

Start with `python -m benchmarks.control.run`. Every system runs as it would in production, with its own
workers on real servers, but its jobs compute nothing: what remains is the control plane.
"""
