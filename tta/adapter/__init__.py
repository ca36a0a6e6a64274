"""The surgeon: proposes candidates, decides nothing. May crash or be killed at any moment."""
