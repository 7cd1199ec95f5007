"""Behind `loramux bench`: workloads, a client for any OpenAI-compatible server, ceilings of the machine, and peers.

Knows servers only from outside, through HTTP, and our engine only through its public interface.
"""
