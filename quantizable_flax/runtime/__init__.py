"""Devices and hosts: meshes, processes, chips, throughput, profiles, the terminal."""
