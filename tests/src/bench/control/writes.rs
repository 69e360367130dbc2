//! Durable writes: so many clients, each with a connection and an object of its own, each waiting for
//! its answer before the next write. Beside it etcd takes values of the same size, on the same file
//! system, through the same TLS.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::super::api::{Api, NAMESPACE};
use super::super::report::{Bound, Report};
use super::Step;
use super::etcd::{Etcd, EtcdClient};
use super::plane::{self, Plane};

const CLIENT_COUNTS: [usize; 3] = [1, 32, 256];
/// Of one measurement.
const DURATION: Duration = Duration::from_millis(1_500);
/// From starting strace to all threads being traced.
const ATTACH: Duration = Duration::from_millis(500);

/// A configuration of the usual size; its content is never the same twice.
fn object(client: usize, number: u64) -> Value {
    let text = format!("{number:0>200}");
    json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": format!("writer-{client}"), "namespace": NAMESPACE},
        "data": {"content": text},
    })
}

/// What is written at a time.
pub(super) async fn run(
    bin: &Path,
    dir: &Path,
    rounds: usize,
    report: &mut Report,
    step: &mut Step<'_>,
) -> Result<()> {
    step.next("writes: starting");
    let (gantry_dir, etcd_dir) = (dir.join("writes"), dir.join("writes-etcd"));
    for dir in [&gantry_dir, &etcd_dir] {
        std::fs::create_dir_all(dir)?;
    }
    let plane = Plane::start(bin, &gantry_dir).await?;
    let first = plane.api().await?;
    first.create_namespace(NAMESPACE).await?;
    let most = CLIENT_COUNTS.into_iter().max().unwrap_or(1);
    let mut apis = Vec::new();
    let mut size = 0;
    for client in 0..most {
        let api = plane.api().await?;
        let made = api.create("configmaps", &object(client, 0)).await?;
        size = made.to_string().len();
        apis.push(api);
    }
    let etcd = match Etcd::start(&etcd_dir).await? {
        Ok(etcd) => Some(etcd),
        Err(reason) => {
            println!("skipped: etcd beside it: {reason}");
            None
        }
    };
    let mut puts = Vec::new();
    if let Some(etcd) = &etcd {
        for _ in 0..most {
            puts.push(etcd.client().await?);
        }
    }
    let mut bytes: BTreeMap<String, f64> = BTreeMap::new();
    // The first of all pays for cold caches.
    gantry(&apis[..32.min(most)], DURATION / 3).await?;
    for round in 0..rounds {
        for count in CLIENT_COUNTS {
            step.next(&format!(
                "writes: round {} of {rounds}, {count} clients",
                round + 1
            ));
            let mut both = vec![("gantry", plane.pid())];
            both.extend(etcd.as_ref().map(|etcd| ("etcd", etcd.pid())));
            for (name, pid) in both {
                let before = plane::written_bytes(pid)?;
                let made = match name {
                    "gantry" => gantry(&apis[..count], DURATION).await?,
                    _ => etcd_puts(&puts[..count], size, DURATION).await?,
                };
                let written = plane::written_bytes(pid)? - before;
                let case = case(name, count);
                report.add_round(&case, vec![made.rate()]);
                bytes.insert(case, written / made.count);
            }
        }
    }
    for (case, bytes) in &bytes {
        report.count(&format!("{case}: bytes to the disk per write"), *bytes);
    }
    for count in CLIENT_COUNTS {
        step.next(&format!("writes: counting fsyncs, {count} clients"));
        let mut both = vec![("gantry", plane.pid())];
        both.extend(etcd.as_ref().map(|etcd| ("etcd", etcd.pid())));
        for (name, pid) in both {
            let only = (name == "gantry").then_some("store-writer");
            let Some(syncs) = Syncs::start(pid, only)? else {
                println!("skipped: fsyncs of {name} are not counted without strace");
                continue;
            };
            tokio::time::sleep(ATTACH).await;
            let made = match name {
                "gantry" => gantry(&apis[..count], DURATION).await?,
                _ => etcd_puts(&puts[..count], size, DURATION).await?,
            };
            let what = format!("{}: fsyncs per write", case(name, count));
            report.count(&what, syncs.end()? / made.count);
        }
    }
    let most = case("gantry", most);
    let gain = report.ratio(&most, &case("gantry", 1));
    if etcd.is_some() {
        for count in CLIENT_COUNTS {
            report.ratio(&case("gantry", count), &case("etcd", count));
        }
        report.ratio("etcd, 256 clients: writes/s", &case("etcd", 1));
    }
    report.target(
        "durable writes/s of 256 clients by those of one",
        Bound::Min,
        20.0,
        gain,
    );
    plane.kill()
}

fn case(name: &str, clients: usize) -> String {
    match clients {
        1 => format!("{name}, 1 client: writes/s"),
        _ => format!("{name}, {clients} clients: writes/s"),
    }
}

/// What a measurement has done.
struct Made {
    count: f64,
    took: Duration,
}

impl Made {
    fn rate(&self) -> f64 {
        self.count / self.took.as_secs_f64()
    }
}

async fn gantry(clients: &[Api], duration: Duration) -> Result<Made> {
    let start = u64::from(rand_start());
    together(clients, duration, move |api, client, number| async move {
        api.update("configmaps", &object(client, start + number))
            .await
    })
    .await
}

async fn etcd_puts(clients: &[EtcdClient], size: usize, duration: Duration) -> Result<Made> {
    together(
        clients,
        duration,
        move |mut put, client, number| async move {
            let value = format!("{number:0>size$}");
            let key = format!("/registry/configmaps/{NAMESPACE}/writer-{client}");
            put.put(&key, value.as_bytes()).await
        },
    )
    .await
}

/// Numbers of an earlier measurement would change nothing.
fn rand_start() -> u32 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.subsec_nanos() ^ (now.as_secs() as u32))
}

/// Every client writes until the time is over; who has begun also ends.
async fn together<C, F>(
    clients: &[C],
    duration: Duration,
    write: impl Fn(C, usize, u64) -> F + Clone + Send + 'static,
) -> Result<Made>
where
    C: Clone + Send + 'static,
    F: Future<Output = Result<()>> + Send + 'static,
{
    let began = Instant::now();
    let tasks: Vec<_> = clients
        .iter()
        .cloned()
        .enumerate()
        .map(|(number, client)| {
            let write = write.clone();
            tokio::spawn(async move {
                let mut count = 0;
                while began.elapsed() < duration {
                    write(client.clone(), number, count).await?;
                    count += 1;
                }
                anyhow::Ok(count)
            })
        })
        .collect();
    let mut count = 0;
    for task in tasks {
        count += task.await??;
    }
    let took = began.elapsed();
    if count == 0 {
        bail!("nothing was written in {took:?}");
    }
    Ok(Made {
        count: count as f64,
        took,
    })
}

/// strace on a process, for its fsyncs only.
struct Syncs {
    child: std::process::Child,
    table: tempfile::NamedTempFile,
}

impl Syncs {
    /// On the thread of that name, so that the others are as fast as ever, or on all. None without
    /// strace.
    fn start(pid: u32, only: Option<&str>) -> Result<Option<Self>> {
        let table = tempfile::NamedTempFile::new()?;
        let mut strace = Command::new("strace");
        strace.args(["-c", "-e", "trace=fsync,fdatasync,msync,sync_file_range"]);
        strace.arg("-o").arg(table.path());
        match only {
            Some(name) => strace.arg("-p").arg(thread(pid, name)?),
            None => strace.arg("-f").arg("-p").arg(pid.to_string()),
        };
        strace
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        match strace.spawn() {
            Ok(child) => Ok(Some(Self { child, table })),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context("start strace"),
        }
    }

    /// Detaches and counts.
    fn end(mut self) -> Result<f64> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        kill(pid, Signal::SIGINT)?;
        self.child.wait()?;
        let text = std::fs::read_to_string(self.table.path())?;
        sync_count(&text).context("strace has seen no fsync: may it trace?")
    }
}

impl Drop for Syncs {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The number of a process's thread.
fn thread(pid: u32, name: &str) -> Result<String> {
    let all = std::fs::read_dir(format!("/proc/{pid}/task"))?;
    for thread in all {
        let thread = thread?;
        let comm = std::fs::read_to_string(thread.path().join("comm"))?;
        if comm.trim_end() == name {
            return Ok(thread.file_name().to_string_lossy().into_owned());
        }
    }
    bail!("process {pid} has no thread {name}")
}

/// The calls of strace's table; None without any.
fn sync_count(table: &str) -> Option<f64> {
    let of_line = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let is_call = fields.last().is_some_and(|name| name.contains("sync"));
        is_call
            .then(|| fields.get(3)?.parse::<f64>().ok())
            .flatten()
    };
    let counts: Vec<f64> = table.lines().filter_map(of_line).collect();
    (!counts.is_empty()).then(|| counts.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fsyncs_are_counted_over_all_kinds() {
        let table = "% time     seconds  usecs/call     calls    errors syscall\n\
            ------ ----------- ----------- --------- --------- ----------------\n \
            99.00    0.054321          54      1000           fdatasync\n  \
            1.00    0.000321          54         5         1 fsync\n\
            ------ ----------- ----------- --------- --------- ----------------\n\
            100.00    0.054642                  1005         1 total\n";
        assert_eq!(sync_count(table), Some(1005.0));
        assert_eq!(sync_count("strace: attach: not permitted\n"), None);
    }

    #[test]
    fn objects_differ_from_write_to_write() {
        assert_ne!(object(1, 1), object(1, 2));
        assert_eq!(
            object(1, 1)["data"]["content"].as_str().map(str::len),
            Some(200)
        );
    }
}
