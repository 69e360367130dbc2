//! The control plane and the nodes' feed in a simulated world: a clock that passes only when everybody
//! waits, a net that delays, cuts and breaks, disks that lose power or fill up, processes that die anywhere.
//!
//! ```text
//!  seed ─► plan: wishes, faults ─► world ─► control (real: store, registry, feed, scheduler, controllers)
//!                                    │  └─► nodes   (real: the agent's feed; runtime and data plane are noted)
//!                                    ├─ host: clock, randomness, disk        ├─ wire: the net
//!                                    └─ history: what must be so, at every revision and every step
//! ```
//! Every seed is a process of its own, with one thread for everything, so a seed is always the same run.
//! `GANTRY_SIM_SEED=n` runs one seed and shows what happens; `GANTRY_SIM_SEEDS=a-b` runs those.
//! `missed.rs` names seeds in which a rule of the feed is switched off and must be missed.

mod simulation {
    pub mod control;
    pub mod history;
    pub mod host;
    pub mod missed;
    pub mod node;
    pub mod plan;
    pub mod runner;
    pub mod state;
    pub mod wire;
    pub mod world;
}

fn main() -> std::process::ExitCode {
    simulation::runner::main()
}
