"""Supervision, decisions and memory: owns every decision and every byte on disk. No torch, no session."""
