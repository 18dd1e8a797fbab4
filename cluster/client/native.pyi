"""What Python sees of `native`."""

from sheepdog.cluster.client.exchange import Exchange as Exchange
