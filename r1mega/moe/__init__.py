"""Mixture of experts: router, dispatcher, experts, load balance."""
