//! Gantry's tasks. `cargo xtask up` runs the main job, `cargo xtask test` all tests; each does its
//! own set-up. One file per task.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod build;
mod census;
mod down;
mod ebpf;
mod image;
mod netfilter;
mod port;
mod report;
mod run;
mod setup;
mod test;
mod tidy;
mod up;
mod vm;

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Gantry's tasks",
    disable_help_subcommand = true
)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Set up, build, and run real pods behind a real Service on this machine
    Up(up::Arguments),
    /// Remove everything that `up` made and print what is left
    Down,
    /// Set up, then run every check and every test
    Test(test::Arguments),
    /// Run the scenarios in a virtual machine of our own (pure cgroup v2)
    VmTest(vm::Arguments),
    /// Measure pod start, connections and memory beside what they replace
    Bench(bench::Arguments),
    /// Install what is missing (root, Debian or Ubuntu), or say what is
    Setup,
    /// Build the eBPF programs into target/bpf/gantry.o
    Ebpf,
    /// Make the images of the main job into target/images
    Images,
    /// Check that docs and names are in order
    Tidy,
    /// Print what of ours is on this machine: processes, netns, links, cgroups, mounts, BPF pins
    Census,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match arguments.task {
        Task::Up(arguments) => up::run(&arguments),
        Task::Down => down::run(),
        Task::Test(arguments) => test::run(&arguments),
        Task::VmTest(arguments) => vm::task(&arguments),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Setup => setup::ensure(setup::For::Test),
        Task::Ebpf => ebpf::build(&run::root(), ebpf::Variant::Release)
            .map(|object| println!("{}", object.display()))
            .map_err(anyhow::Error::from),
        Task::Images => image::archive(&image::NGINX)
            .and_then(|_| image::archive(&image::BUSYBOX))
            .map(drop),
        Task::Tidy => tidy::run(),
        Task::Census => down::census(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
