//! `cargo xtask bench`: builds in release, lets `gantry-bench` measure, prints its figures as tables
//! and judges the targets.
//!
//! `setup ─► build ─► gantry-bench NAME (a cluster of its own) ─► target/bench/NAME.json ─► tables`
//!
//! What is measured and how: `tests/src/bench`. `services` needs no cluster and has a report of its own;
//! `control` is the control plane alone, and `nodes` are virtual machines (`tests/src/machines/bench.rs`):
//! both need no root, and run only when named.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{build, image, report, run, setup, vm};

/// In the order of running; `tests/src/bench/mod.rs` has the same.
const NAMES: [&str; 10] = [
    "pod_start",
    "burst",
    "exec",
    "restart",
    "service_connect",
    "footprint",
    "density",
    SERVICES,
    CONTROL,
    NODES,
];
const SERVICES: &str = "services";
const CONTROL: &str = "control";
const NODES: &str = "nodes";

/// What `bench` takes.
#[derive(clap::Args)]
pub struct Arguments {
    /// Which ones; all but `control` and `nodes` without a name
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(NAMES))]
    names: Vec<String>,
    /// Pods of the benchmarks of a full node [default: 500, or what half of the free memory holds]
    #[arg(long, value_name = "COUNT")]
    pods: Option<usize>,
    /// Exit with 1 and name each target that is missed
    #[arg(long)]
    check: bool,
    /// Of `services`: how many, `AxB` for A of which one has B endpoints
    /// [default: 1,100,1000,10000,1x1000]
    #[arg(long, value_name = "LIST")]
    services: Option<String>,
    /// Of `control`: how many hollow agents [default: 100,1000,5000]
    #[arg(long, value_name = "LIST")]
    nodes: Option<String>,
    /// Of `services` and `control`: rounds whose median is the figure [default: 7 and 5]
    #[arg(long, value_name = "COUNT")]
    rounds: Option<usize>,
    /// Of `services` and `control`: a minute to see that everything works; its figures are none
    #[arg(long)]
    quick: bool,
    /// Of `services`: besides direct only gantry, iptables-nft, iptables-legacy or nftables; may be given
    /// several times. Of `control`: only writes, or only nodes
    #[arg(long, value_name = "PART")]
    only: Vec<String>,
}

impl Arguments {
    /// The options of `services`, as `gantry-bench` takes them.
    fn of_services(&self) -> Vec<String> {
        self.words("--services", self.services.as_ref())
    }

    /// The same of `control`.
    fn of_control(&self) -> Vec<String> {
        self.words("--nodes", self.nodes.as_ref())
    }

    /// Options of what is not measured are a mistake.
    fn check(&self) -> Result<()> {
        let named = |wanted: &str| self.names.iter().any(|name| name == wanted);
        if self.services.is_some() && !named(SERVICES) {
            bail!("--services is of `cargo xtask bench services`");
        }
        if self.nodes.is_some() && !named(CONTROL) {
            bail!("--nodes is of `cargo xtask bench control`");
        }
        let both = self.rounds.is_some() || self.quick || !self.only.is_empty();
        if both && !named(SERVICES) && !named(CONTROL) {
            bail!("--rounds, --quick and --only are of `cargo xtask bench services` and `control`");
        }
        Ok(())
    }

    fn words(&self, list: &str, value: Option<&String>) -> Vec<String> {
        let mut words = Vec::new();
        let rounds = self.rounds.map(|rounds| rounds.to_string());
        for (name, value) in [(list, value.cloned()), ("--rounds", rounds)] {
            words.extend(value.into_iter().flat_map(|value| [name.to_owned(), value]));
        }
        for layout in &self.only {
            words.extend(["--only".to_owned(), layout.clone()]);
        }
        words.extend(self.quick.then(|| "--quick".to_owned()));
        words
    }
}

/// Measures and prints; with `--check` a missed target is an error.
pub fn run(arguments: &Arguments) -> Result<()> {
    if arguments.names.iter().all(|n| n == NODES) && !arguments.names.is_empty() {
        return nodes(arguments);
    }
    let only = |wanted: &str| {
        let names = &arguments.names;
        names.iter().all(|name| name == wanted) && !names.is_empty()
    };
    let (alone, control) = (only(SERVICES), only(CONTROL));
    if !run::is_root() && !control {
        bail!("pods need root: run `cargo xtask bench` as root");
    }
    arguments.check()?;
    let step = report::step("setting up this machine");
    match control {
        true => setup::ensure(setup::For::Control)?,
        false => setup::ensure(setup::For::Bench)?,
    }
    if arguments.names.iter().any(|name| name == CONTROL) {
        setup::offer_etcd();
    }
    drop(step);
    let step = report::step("building in release");
    let bin = if control {
        build::control_plane()?
    } else if alone {
        build::measurer()?
    } else {
        image::archive(&image::BUSYBOX)?;
        build::binaries(build::Profile::Bench, "up")?
    };
    drop(step);
    let out = run::target().join("bench");
    std::fs::create_dir_all(&out).with_context(|| format!("create {}", out.display()))?;
    let mut missed = Vec::new();
    for name in NAMES.iter().filter(|n| is_wanted(arguments, n)) {
        if *name == NODES {
            nodes(arguments)?;
            continue;
        }
        let figures = measure(name, &bin, &out, arguments)?;
        print!("{}", text(&figures));
        let lost = missed_targets(&figures).into_iter();
        missed.extend(lost.map(|what| format!("{name}: {what}")));
    }
    for what in &missed {
        println!("missed {what}");
    }
    if arguments.check && !missed.is_empty() {
        bail!("{} targets are missed", missed.len());
    }
    Ok(())
}

/// On machines of its own.
fn nodes(arguments: &Arguments) -> Result<()> {
    setup::ensure(setup::For::Vm)?;
    let _step = report::step("measuring nodes");
    let out = run::target().join("bench");
    std::fs::create_dir_all(&out).with_context(|| format!("create {}", out.display()))?;
    let file = out.join(format!("{NODES}.json"));
    // Old figures must not pass for new ones.
    if file.exists() {
        std::fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))?;
    }
    let mut figures = vm::bench()?;
    figures["commit"] = commit().into();
    std::fs::write(&file, serde_json::to_string_pretty(&figures)?)
        .with_context(|| format!("write {}", file.display()))?;
    print!("{}", text(&figures));
    let missed = missed_targets(&figures);
    for what in &missed {
        println!("missed {NODES}: {what}");
    }
    if arguments.check && !missed.is_empty() {
        bail!("{} targets are missed", missed.len());
    }
    Ok(())
}

fn is_wanted(arguments: &Arguments, name: &str) -> bool {
    let all = arguments.names.is_empty() && name != NODES && name != CONTROL;
    all || arguments.names.iter().any(|n| n == name)
}

fn measure(name: &str, bin: &Path, out: &Path, arguments: &Arguments) -> Result<Value> {
    let _step = report::step(&format!("measuring {name}"));
    let file = out.join(format!("{name}.json"));
    // Old figures must not pass for new ones.
    if file.exists() {
        std::fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))?;
    }
    let mut bench = run::program(
        &run::target().join("release/gantry-bench").to_string_lossy(),
        [name],
    );
    let options = match name {
        SERVICES => arguments.of_services(),
        CONTROL => arguments.of_control(),
        _ => Vec::new(),
    };
    let pods = arguments.pods;
    bench
        .arg(out)
        .args(options)
        .env("GANTRY_BIN", bin)
        .env("GANTRY_COMMIT", commit())
        .envs(pods.map(|count| ("GANTRY_BENCH_PODS", count.to_string())))
        .env("GANTRY_IMAGES", run::target().join("images"));
    run::shown(&mut bench)?;
    let text = std::fs::read(&file).with_context(|| format!("read {}", file.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is no JSON", file.display()))
}

/// What is measured; with a plus where files differ from it.
fn commit() -> String {
    let git = |words: &[&str]| run::captured(&mut run::program("git", words));
    let Ok(head) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return "unknown".into();
    };
    let changed = git(&["status", "--porcelain"]).is_ok_and(|said| !said.trim().is_empty());
    format!("{}{}", head.trim(), if changed { "+" } else { "" })
}

/// The whole document as tables.
fn text(figures: &Value) -> String {
    let unit = figures["unit"].as_str().unwrap_or_default();
    let mut tables = Vec::new();
    let header = [
        format!("case, {unit}"),
        "p50".into(),
        "p90".into(),
        "p99".into(),
    ];
    tables.push((header.to_vec(), quantiles(&figures["cases"])));
    tables.push((
        vec!["ratio".into(), "p50".into()],
        quantiles(&figures["ratios"]),
    ));
    tables.push((
        vec![format!("phase, {unit}"), "p50".into()],
        quantiles(&figures["phases"]),
    ));
    let counts = figures["counts"].as_object().into_iter().flatten();
    let counts = counts
        .map(|(name, got)| vec![name.clone(), number(got)])
        .collect();
    tables.push((vec!["count".into(), String::new()], counts));
    let headers = ["target", "limit", "got", ""].map(str::to_owned);
    tables.push((headers.to_vec(), targets(figures)));
    let mut text = String::new();
    for (header, rows) in tables.into_iter().filter(|(_, rows)| !rows.is_empty()) {
        let all: Vec<Vec<String>> = std::iter::once(header).chain(rows).collect();
        text.push_str(&report::table(&all));
    }
    text
}

fn quantiles(of: &Value) -> Vec<Vec<String>> {
    let row = |(name, figures): (&String, &Value)| {
        let each = ["p50", "p90", "p99"].iter().filter_map(|q| figures.get(q));
        std::iter::once(name.clone())
            .chain(each.map(number))
            .collect()
    };
    of.as_object().into_iter().flatten().map(row).collect()
}

fn targets(figures: &Value) -> Vec<Vec<String>> {
    let row = |target: &Value| {
        let limit = match (target.get("max"), target.get("min")) {
            (Some(max), _) => format!("<= {}", number(max)),
            (None, Some(min)) => format!(">= {}", number(min)),
            (None, None) => String::new(),
        };
        let what = target["what"].as_str().unwrap_or_default().to_owned();
        let met = if is_met(target) { "met" } else { "MISSED" };
        vec![what, limit, number(&target["got"]), met.to_owned()]
    };
    figures["targets"]
        .as_array()
        .into_iter()
        .flatten()
        .map(row)
        .collect()
}

fn is_met(target: &Value) -> bool {
    target["met"] == true
}

/// Each as a person would say it; a document without targets promises nothing.
fn missed_targets(figures: &Value) -> Vec<String> {
    let rows = targets(figures).into_iter();
    let missed = rows.filter(|row| row.last().is_some_and(|met| met != "met"));
    missed
        .map(|row| format!("{} is {}, wanted {}", row[0], row[2], row[1]))
        .collect()
}

fn number(value: &Value) -> String {
    value
        .as_f64()
        .map_or_else(|| "not measured".into(), |v| format!("{v}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn missed_targets_are_named_with_what_was_found_and_wanted() {
        let figures = json!({"targets": [
            {"what": "a", "max": 1.0, "got": 0.9, "met": true},
            {"what": "b", "max": 1.02, "got": 1.5, "met": false},
            {"what": "c", "min": 3.0, "got": null, "met": false},
        ]});
        let wanted = ["b is 1.5, wanted <= 1.02", "c is not measured, wanted >= 3"];
        assert_eq!(missed_targets(&figures), wanted);
    }

    #[test]
    fn empty_tables_are_left_out() {
        let figures = json!({
            "unit": "ms",
            "cases": {"gantry": {"p50": 1.5, "p90": 2.0, "p99": 3.25}},
            "ratios": {}, "targets": [],
        });
        let wanted = "    case, ms  p50  p90  p99\n    gantry    1.5    2  3.25\n";
        assert_eq!(text(&figures), wanted);
    }

    fn arguments(line: &str) -> Arguments {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            bench: Arguments,
        }
        let words = std::iter::once("bench").chain(line.split_whitespace());
        <Line as clap::Parser>::try_parse_from(words).unwrap().bench
    }

    #[test]
    fn options_of_services_are_handed_on() {
        let got =
            arguments("services --quick --services 1,10 --only gantry --rounds 5 --only nftables");
        let wanted = "--services 1,10 --rounds 5 --only gantry --only nftables --quick";
        assert_eq!(got.of_services().join(" "), wanted);
        assert!(arguments("burst --check").of_services().is_empty());
    }

    #[test]
    fn options_are_of_what_is_named() {
        let control = arguments("control --nodes 100,1000 --rounds 5");
        assert_eq!(
            control.of_control().join(" "),
            "--nodes 100,1000 --rounds 5"
        );
        for good in ["", "control --nodes 1 --quick", "services --services 1"] {
            arguments(good).check().unwrap();
        }
        for bad in [
            "control --services 1",
            "services --nodes 1",
            "burst --quick",
        ] {
            assert!(arguments(bad).check().is_err(), "{bad}");
        }
    }

    #[test]
    fn without_names_all_are_wanted() {
        let mut arguments = arguments("");
        let wanted = NAMES.iter().filter(|n| is_wanted(&arguments, n));
        assert_eq!(wanted.count(), NAMES.len() - 2, "all but control and nodes");
        arguments.names.push("footprint".into());
        assert!(!is_wanted(&arguments, "pod_start") && is_wanted(&arguments, "footprint"));
    }
}
