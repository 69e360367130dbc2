//! Integration tests: the built binaries on a real kernel.
//!
//! ```text
//! tests/integration.rs  one test per scenario on this machine (root; else skipped in words)
//! src/bin/gantry-vm-init.rs  the same scenarios as init of a virtual machine
//!        ├──► machines/  the same on several of them: their hands, their faults
//!        └──► units.rs   one where systemd is the first process
//! src/sweep.rs  SIGKILL of agent, shim and helper at their system calls
//!        └──► scenario.rs (its files: one an area) ──► cluster.rs ──► gantry-control, gantry-agent, gantry
//! tests/simulation.rs  control plane and nodes on a simulated clock, net and disk
//! src/fuzz.rs  what comes from outside, changed at random; fuzz/ drives the same bodies by libFuzzer
//! tests/nodes.rs  nodes in network namespaces (src/nodes.rs): what goes from one to another
//! ```
//! A scenario looks at the kernel (cgroup files, /proc, sockets), not only at our own status. Every
//! cluster ends with a census of zero.

pub mod api;
pub mod bench;
#[path = "../../xtask/src/census.rs"]
pub mod census;
pub mod cluster;
pub mod csi_driver;
pub mod device_plugin;
pub mod fuzz;
pub mod inventory;
pub mod machines;
pub mod nfs_server;
pub mod nodes;
mod plugin_socket;
pub mod scenario;
pub mod sweep;
pub mod units;

#[cfg(test)]
mod feed;
