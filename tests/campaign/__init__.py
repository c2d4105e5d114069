"""The networks, changes to them and calls from which `tests/test_campaign.py` draws its cases."""
