"""Membership engines behind one interface (`base.Driver`)."""
