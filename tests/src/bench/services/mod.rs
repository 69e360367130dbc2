//! `cargo xtask bench services`: Services by Gantry beside the rules that kube-proxy makes, and beside
//! none, on throw-away nodes of one machine.
//!
//! ```text
//!  model ─┬─► layout_gantry ─► gantry (the agent's data plane)  ─┐
//!         ├─► layout_iptables ─► iptables-restore               ─┼─► bed: a node, pods, somebody outside
//!         └─► layout_nft ─► nft -f                              ─┘     │ stage: one for each layout
//!  measure: what is compared takes turns ◄── peer: clients and servers ┘
//!     └─► figures ─► text (terminal), JSON, svg, html (target/bench/services.html)
//! ```
//! Nothing of the host is touched: rules and programs are of namespaces and of a cgroup of this
//! benchmark, all named `gantry-bench*`. They go at its end, at Ctrl-C, and, after a crash, at its next
//! start. A layout that does not reach every endpoint evenly has no figures: the benchmark fails.

use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Pid;

use self::figures::Figures;
use self::measure::{Amount, Bench, step_count};
use self::model::Size;
use self::progress::Progress;
use self::stage::{Cpus, Layout};

mod bed;
mod facts;
mod figures;
mod gantry;
mod html;
mod layout_gantry;
mod layout_iptables;
mod layout_nft;
mod measure;
mod model;
pub mod peer;
pub(super) mod progress;
mod stage;
mod svg;
mod text;

pub use self::bed::clear;

/// What is loaded without `--services`.
const SIZES: &str = "1,100,1000,10000,1x1000";
const QUICK_SIZES: &str = "1,10";
const ROUND_COUNT: usize = 7;
const QUICK_ROUND_COUNT: usize = 2;
/// What the model has addresses for, and Gantry's maps room.
const SERVICE_COUNT_MAX: usize = 60_000;
const ENDPOINT_COUNT_MAX: usize = 2_000;
/// Of one target: how fast so many Services are loaded.
const MANY: usize = 30_000;
const MANY_MS: f64 = 150.0;

/// Held while something is made; who cleans up after a signal never gives it back.
static MAKING: Mutex<()> = Mutex::new(());

fn making() -> MutexGuard<'static, ()> {
    MAKING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is to be measured.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    sizes: Vec<Size>,
    rounds: usize,
    quick: bool,
    layouts: Vec<Layout>,
    clear: bool,
}

impl Options {
    /// Understands `--services LIST`, `--rounds N`, `--quick`, `--only LAYOUT`, `--clear`.
    pub fn parse(words: &[String]) -> Result<Self> {
        let (mut sizes, mut rounds, mut only) = (None, None, Vec::new());
        let (mut quick, mut clear) = (false, false);
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let mut value = || {
                words
                    .next()
                    .with_context(|| format!("{word} wants a value"))
            };
            match word.as_str() {
                "--quick" => quick = true,
                "--clear" => clear = true,
                "--services" => sizes = Some(value()?.clone()),
                "--rounds" => rounds = Some(value()?.parse().context("--rounds wants a number")?),
                "--only" => only.push(layout(value()?)?),
                other => bail!("no such option: {other}"),
            }
        }
        let sizes = sizes.unwrap_or_else(|| if quick { QUICK_SIZES } else { SIZES }.into());
        let rounds = rounds.unwrap_or(if quick {
            QUICK_ROUND_COUNT
        } else {
            ROUND_COUNT
        });
        ensure!(rounds > 0, "--rounds wants at least 1");
        // Without the floor there is nothing to compare with.
        let is_wanted =
            |layout: &Layout| only.is_empty() || *layout == Layout::Direct || only.contains(layout);
        Ok(Self {
            sizes: sizes.split(',').map(size).collect::<Result<_>>()?,
            rounds,
            quick,
            layouts: Layout::ALL.into_iter().filter(is_wanted).collect(),
            clear,
        })
    }
}

/// `1000`, or `1x1000`.
fn size(word: &str) -> Result<Size> {
    let bad = || format!("{word:?} is no number of Services, such as 1000, or 1x1000");
    let number = |text: &str| text.parse::<usize>().with_context(bad);
    let size = match word.split_once('x') {
        Some((services, endpoints)) => Size {
            services: number(services)?,
            endpoints: number(endpoints)?,
        },
        None => Size::of(number(word)?),
    };
    let fits = (1..=SERVICE_COUNT_MAX).contains(&size.services)
        && (1..=ENDPOINT_COUNT_MAX).contains(&size.endpoints);
    ensure!(
        fits,
        "{word}: 1 to {SERVICE_COUNT_MAX} Services and 1 to {ENDPOINT_COUNT_MAX} endpoints can be measured"
    );
    Ok(size)
}

fn layout(name: &str) -> Result<Layout> {
    let found = Layout::ALL.into_iter().find(|layout| layout.name() == name);
    let names = Layout::ALL.map(Layout::name).join(", ");
    found.with_context(|| format!("no layout {name:?}: there are {names}"))
}

/// Measures, prints tables, writes `services.json`, `services.html` and a plot per measure into `out`.
pub fn run(out: &Path, options: &Options) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "namespaces and eBPF need root: run `cargo xtask bench services` as root"
    );
    // One at a time: clusters of tests look for what is Gantry's on the whole machine.
    let lock = File::create(std::env::temp_dir().join("gantry-tests.lock"))?;
    lock.lock()?;
    if options.clear {
        return clear();
    }
    clear().context("remove what an earlier run has left")?;
    clear_at_signals()?;
    let measured = measure(options);
    let cleared = clear().context("remove what this run has made");
    let figures = measured?;
    cleared?;
    print!("{}", text::tables(&figures));
    write(out, &figures)
}

fn measure(options: &Options) -> Result<Figures> {
    let cpus = settle()?;
    std::fs::create_dir_all(bed::directory())
        .with_context(|| format!("create {}", bed::directory().display()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("start the async runtime")?;
    let mut skipped: Vec<String> = Vec::new();
    let mut layouts = options.layouts.clone();
    layouts.retain(|layout| match stage::missing(*layout) {
        None => true,
        Some(reason) => {
            skipped.push(reason);
            false
        }
    });
    skipped.push(stage::no_ipvs());
    let amount = match options.quick {
        true => Amount::quick(options.rounds),
        false => Amount::full(options.rounds),
    };
    let loaders: Vec<_> = layouts
        .iter()
        .filter_map(|layout| layout.loader())
        .collect();
    let steps = options.sizes.len() * step_count(layouts.len(), options.rounds) + 1;
    let mut bench = Bench {
        runtime: &runtime,
        cpus,
        amount,
        figures: Figures {
            facts: facts::facts(&loaders),
            skipped,
            ..Figures::default()
        },
        progress: Progress::new(steps),
    };
    for size in &options.sizes {
        bench.size(*size, &layouts)?;
    }
    bench.progress.step("many Services");
    if layouts.contains(&Layout::Gantry) && !options.quick {
        bench.load_many(MANY, MANY_MS)?;
    }
    bench.progress.end();
    let mut figures = bench.figures;
    figures.facts.push(("load after", facts::load()));
    let rounds = format!(
        "{}; both ends on processor {}, the rest on {}",
        options.rounds, cpus.measured, cpus.other
    );
    figures.facts.push(("rounds", rounds));
    figures.judge();
    Ok(figures)
}

/// What is measured gets a processor; this process, and what it starts to load rules, stays off it.
fn settle() -> Result<Cpus> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let mut all = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu) == Ok(true));
    let other = all.next().context("no processor may be used")?;
    let measured = all.next_back().unwrap_or(other);
    let mut one = CpuSet::new();
    one.set(other)?;
    sched_setaffinity(Pid::from_raw(0), &one).context("stay on one processor")?;
    Ok(Cpus { measured, other })
}

/// From now on a signal that ends this process removes everything first.
#[expect(
    clippy::disallowed_methods,
    reason = "the main thread is measuring and cannot return; all that is to be dropped is cleared"
)]
fn clear_at_signals() -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    // No other thread has been started by now; those to come inherit it. Children do not.
    signals.thread_block().context("block signals")?;
    let wait = move || {
        let Ok(signal) = signals.wait() else { return };
        let _last = making();
        eprintln!("\ngantry-bench: {signal}: removing namespaces, programs and rules");
        if let Err(error) = clear() {
            eprintln!("gantry-bench: {error:#}; the next run tries again");
        }
        std::process::exit(128 + signal as i32);
    };
    let thread = std::thread::Builder::new().name("signals".into());
    thread.spawn(wait).context("start a thread")?;
    Ok(())
}

fn write(out: &Path, figures: &Figures) -> Result<()> {
    let put = |name: String, text: String| {
        let path = out.join(name);
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    };
    let json = serde_json::to_string_pretty(&figures.to_json())?;
    put("services.json".into(), json + "\n")?;
    for (name, plot) in html::plots(figures) {
        put(format!("services-{name}.svg"), plot)?;
    }
    put("services.html".into(), html::document(figures))?;
    println!("report: {}", out.join("services.html").display());
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
    fn without_options_everything_is_measured() {
        let options = parse("").unwrap();
        let labels: Vec<String> = options.sizes.iter().map(|size| size.label()).collect();
        assert_eq!(labels.join(","), SIZES);
        assert_eq!(options.layouts, Layout::ALL);
        assert!(options.rounds >= 5 && !options.quick);
    }

    #[test]
    fn options_choose_sizes_rounds_and_layouts_but_never_leave_the_floor_out() {
        let options = parse("--quick --services 7,1x50 --rounds 3 --only nftables").unwrap();
        let sizes = [
            Size::of(7),
            Size {
                services: 1,
                endpoints: 50,
            },
        ];
        assert_eq!(options.sizes, sizes);
        assert_eq!(options.layouts, [Layout::Direct, Layout::Nftables]);
        assert_eq!((options.rounds, options.quick), (3, true));
        assert_eq!(parse("--quick").unwrap().rounds, QUICK_ROUND_COUNT);
    }

    #[test]
    fn wrong_options_say_what_is_right() {
        for (line, part) in [
            ("--services 0", "1 to 60000"),
            ("--services 1x9999", "endpoints"),
            ("--services many", "1x1000"),
            ("--rounds 0", "at least 1"),
            ("--rounds", "wants a value"),
            ("--only ipvs", "iptables-nft"),
            ("--fast", "no such option"),
        ] {
            let error = format!("{:#}", parse(line).unwrap_err());
            assert!(error.contains(part), "{line}: {error}");
        }
    }
}
