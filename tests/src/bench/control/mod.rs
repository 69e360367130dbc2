//! `cargo xtask bench control`: the control plane alone, on loopback. No cluster, no root.
//!
//! ```text
//!  writes: 1, 32, 256 clients ──TLS gRPC──► gantry-control │ etcd     (take turns; same file system)
//!  seed: a store of nodes and pods ─► plane: gantry-control ◄──TLS gRPC── hollow: the agents' own feed
//!                                        └─► scale: memory, scheduling, heartbeats, changes
//! ```
//! Clients and agents are in this process and share the machine's processors with what is measured:
//! rates are what both sides together reach. Everything is below the output's directory and on tmpfs,
//! and goes with the benchmark.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::report::Report;
use super::services::progress::Progress;

mod etcd;
mod hollow;
mod plane;
mod scale;
mod seed;
mod writes;

const NODE_COUNTS: &str = "100,1000,5000";
const ROUND_COUNT: usize = 5;
/// From here on scheduling is measured once: a round takes minutes.
const MANY_NODES: usize = 2_000;
/// What the pods' addresses and the nodes' are counted in.
const NODE_COUNT_MAX: usize = 16_000;
/// Files of an agent: its connection and its log, and both again while it joins.
const FILES_PER_NODE: u64 = 4;

/// What is to be measured.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    nodes: Vec<usize>,
    rounds: usize,
    writes: bool,
}

impl Options {
    /// Understands `--nodes LIST`, `--rounds N`, `--only writes|nodes`, `--quick`.
    pub fn parse(words: &[String]) -> Result<Self> {
        let (mut nodes, mut rounds, mut quick) = (None, None, false);
        let (mut writes, mut scale) = (true, true);
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let mut value = || {
                words
                    .next()
                    .with_context(|| format!("{word} wants a value"))
            };
            match word.as_str() {
                "--quick" => quick = true,
                "--nodes" => nodes = Some(value()?.clone()),
                "--rounds" => rounds = Some(value()?.parse().context("--rounds wants a number")?),
                "--only" => match value()?.as_str() {
                    "writes" => scale = false,
                    "nodes" => writes = false,
                    other => bail!("--only {other}: there are writes and nodes"),
                },
                other => bail!("no such option: {other}"),
            }
        }
        let rounds = rounds.unwrap_or(if quick { 1 } else { ROUND_COUNT });
        ensure!(rounds > 0, "--rounds wants at least 1");
        let list = nodes.unwrap_or_else(|| if quick { "20" } else { NODE_COUNTS }.into());
        let mut nodes = Vec::new();
        for word in list.split(',').filter(|_| scale) {
            let count: usize = word.trim().parse().context("--nodes wants numbers")?;
            ensure!(
                (1..=NODE_COUNT_MAX).contains(&count),
                "--nodes {count}: 1 to {NODE_COUNT_MAX}"
            );
            nodes.push(count);
        }
        Ok(Self {
            nodes,
            rounds,
            writes,
        })
    }

    fn rounds_of(&self, nodes: usize) -> usize {
        if nodes >= MANY_NODES { 1 } else { self.rounds }
    }

    fn step_count(&self) -> usize {
        let writes = if self.writes { 4 + 3 * self.rounds } else { 0 };
        let scale = self
            .nodes
            .iter()
            .map(|n| scale::step_count(self.rounds_of(*n)));
        writes + scale.sum::<usize>() + usize::from(!self.nodes.is_empty())
    }
}

/// How far it is, as the parts tell it.
struct Step<'a>(&'a mut Progress);

impl Step<'_> {
    fn next(&mut self, what: &str) {
        self.0.step(what);
    }

    /// Something new of the same step.
    fn within(&mut self, what: &str) {
        self.0.within(what);
    }
}

/// Measures and writes `control.json` into `out`; the programs are in `GANTRY_BIN`.
pub fn run(out: &Path, options: &Options) -> Result<()> {
    let bin = std::env::var_os("GANTRY_BIN").map(PathBuf::from);
    let bin = bin.context("needs GANTRY_BIN, which `cargo xtask bench` sets")?;
    let most = options.nodes.iter().max().copied().unwrap_or(0);
    raise_open_files(most)?;
    // Every TLS user of this process takes the same provider; a second call could only repeat it.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the async runtime")?;
    let report = runtime.block_on(Box::pin(measure(&bin, out, options)))?;
    let path = out.join("control.json");
    let text = serde_json::to_string_pretty(&report.to_json())?;
    std::fs::write(&path, text + "\n").with_context(|| format!("write {}", path.display()))
}

async fn measure(bin: &Path, out: &Path, options: &Options) -> Result<Report> {
    let dir = tempfile::Builder::new()
        .prefix("control-")
        .tempdir_in(out)?;
    let agents = scale::agents_dir(out)?;
    let mut report = Report::new("control", "as named");
    let mut progress = Progress::new(options.step_count());
    let mut step = Step(&mut progress);
    if options.writes {
        let measured = writes::run(bin, dir.path(), options.rounds, &mut report, &mut step);
        Box::pin(measured).await?;
    }
    let place = scale::Place {
        bin,
        dir: dir.path(),
        agents: agents.path(),
    };
    if !options.nodes.is_empty() {
        step.next("an empty control plane");
        let empty_kib = scale::empty_kib(&place).await?;
        report.count("memory of an empty control plane, KiB", empty_kib);
        for nodes in &options.nodes {
            if let Some(reason) = scale::too_many(*nodes)? {
                println!("skipped: {nodes} nodes: {reason}");
                report.count(&format!("{nodes} nodes: skipped"), 1.0);
                continue;
            }
            let rounds = options.rounds_of(*nodes);
            let measured = scale::run(&place, *nodes, rounds, empty_kib, &mut report, &mut step);
            Box::pin(measured).await?;
        }
    }
    progress.end();
    Ok(report)
}

/// Of this process, and so of those that it starts.
fn raise_open_files(nodes: usize) -> Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let wanted = 4_096 + nodes as u64 * FILES_PER_NODE;
    ensure!(
        wanted <= hard,
        "{nodes} nodes want {wanted} open files, the limit is {hard}: raise it with `ulimit -Hn`"
    );
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(wanted), hard)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        Options::parse(&words)
    }

    #[test]
    fn options_say_what_is_measured() {
        let all = parse("").unwrap();
        assert_eq!(
            (all.nodes.as_slice(), all.rounds, all.writes),
            (&[100, 1000, 5000][..], 5, true)
        );
        let some = parse("--nodes 50 --rounds 3 --only nodes").unwrap();
        assert_eq!(
            (some.nodes.as_slice(), some.rounds, some.writes),
            (&[50][..], 3, false)
        );
        assert!(parse("--only writes").unwrap().nodes.is_empty());
        for bad in [
            "--nodes 0",
            "--nodes x",
            "--rounds 0",
            "--only all",
            "--other",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
