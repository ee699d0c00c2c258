"""Profiles: what every part of a model executes and how long it takes (`liftbyimage profile`, docs/profile.md)."""

from liftbyimage.profile.measure import Part, Peer, Profile, Run, profile

__all__ = ["Part", "Peer", "Profile", "Run", "profile"]
