"""Measurements that need a quiet machine; none of them runs in the tests as a whole."""
