"""Stages that find networks: one participant's, from that participant's files alone, and what GIFT does over a cohort."""
