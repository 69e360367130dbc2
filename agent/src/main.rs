//! `gantry-agent`: one per machine. `run` is the agent; the other commands are for people.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use gantry_agent::cgroups::Cgroups;
use gantry_agent::dataplane::{
    Dataplane, FullMaps, bpf::BpfDataplane, bpf::Options, look_after_backends,
    look_after_neighbours,
};
use gantry_agent::devices::DevicePlugins;
use gantry_agent::feed::node_info;
use gantry_agent::feed::{self, Reporter};
use gantry_agent::images::{ImageStore, Registries, drop_in, keep_disk_free};
use gantry_agent::join::{self, CaHash};
use gantry_agent::network::reserve_ports;
use gantry_agent::network::routes::OwnKey;
use gantry_agent::network::{
    NetworkConfig, PodNetworks, Routes, follow_near, follow_routes, follow_uplinks, room,
};
use gantry_agent::node::{NodeResources, flags::NetworkFlags, flags::ResourceFlags};
use gantry_agent::paths::Paths;
use gantry_agent::pods::{self, PodWorkers, hold::Hold, tunnels::PodTunnels};
use gantry_agent::runtime::logs::files::Limits;
use gantry_agent::runtime::spec::security::{Host, check_unsafe_sysctls};
use gantry_agent::runtime::{Runtime, shim::ShimRuntime};
use gantry_agent::shutdown::Shutdown;
use gantry_agent::view::View;
use gantry_agent::volumes::csi::CsiDrivers;
use gantry_agent::volumes::nfs;
use gantry_agent::{
    check, cleanup, credentials, dns, health_check, memory, open_files, orlov, policy,
    run_directory,
};
use gantry_agent::{shutdown, static_pods};
use gantry_api::service_manager::ServiceManager;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

mod image_command;

/// What a wrong command line or configuration exits with (sysexits.h, EX_USAGE).
const EXIT_USAGE: u8 = 64;
/// From the switch of the maps to its acknowledgement: a connect that was on its way through the
/// programs has sent its SYN by then, so that a backend which ends after the ack still answers it.
const SYN_IN_FLIGHT: Duration = Duration::from_millis(2);
/// Where a node keeps what it proves its name with.
const CREDENTIALS: &str = "/etc/gantry/agent";
/// How long the parts may take to end.
const DRAIN: Duration = Duration::from_secs(5);

#[derive(Parser)]
#[command(name = "gantry-agent", version, about = "Gantry's node agent")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run pods and Services on this machine
    Run(Box<Run>),
    /// Make this machine a node of a cluster; `gantry join` also starts the agent
    Join(Join),
    /// The images on this machine
    #[command(subcommand)]
    Image(Image),
    /// Say what this machine lacks; exit code 1 when the agent cannot work
    Check,
    /// End all pods in order because the machine goes down: for the ExecStop of a unit
    Shutdown,
    /// Remove every pod, network, cgroup and eBPF program of ours from this machine
    Cleanup,
    /// Mount an NFS export: the agent's own helper, a process that can be given up
    #[command(name = nfs::HELPER, hide = true)]
    MountNfs(nfs::Mount),
}

#[derive(clap::Args)]
struct Run {
    /// This node's name; the credentials must be made for it [default: the name that they are for, else
    /// the host's]
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
    /// The control plane, or several of one cluster, of which one that answers is used
    /// [default: what was joined, else https://127.0.0.1:6443]
    #[arg(long, value_name = "URL,...")]
    server: Option<String>,
    /// A container's log is put aside when it is larger than this many bytes
    #[arg(long, value_name = "BYTES", default_value_t = 10 << 20)]
    container_log_max_size: u64,
    /// Log files that are kept for a container, the current one included
    #[arg(long, value_name = "COUNT", default_value_t = 5, value_parser = 2..=1000)]
    container_log_max_files: i64,
    /// Directory with manifests of static pods, which run with or without a control plane
    #[arg(long, value_name = "DIR", default_value = "/etc/gantry/manifests")]
    static_pods: PathBuf,
    /// Pod prefix for static pods until a control plane has allocated this node's
    #[arg(long, value_name = "CIDR", default_value = "10.243.255.0/24")]
    standalone_pod_cidr: ipnet::IpNet,
    /// Directory of the sockets of device plugins
    #[arg(long, value_name = "DIR", default_value = gantry_agent::devices::DIRECTORY)]
    device_plugins: PathBuf,
    /// Directory with what gantry join has written, or with client.crt, client.key and ca.crt
    #[arg(long, value_name = "DIR", default_value = CREDENTIALS)]
    credentials: PathBuf,
    /// Sysctls that pods may set although they are not known to be harmless: names, or prefixes
    /// that end with *
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    allowed_unsafe_sysctls: Vec<String>,
    #[command(flatten)]
    network: NetworkFlags,
    #[command(flatten)]
    resources: ResourceFlags,
}

#[derive(clap::Args)]
struct Join {
    /// The control plane, HOST:PORT, or several of one cluster, of which one that answers is enough
    #[arg(value_name = "HOST:PORT,...")]
    server: String,
    /// A bootstrap token: gantry token create makes one
    #[arg(
        long,
        value_name = "TOKEN",
        env = "GANTRY_JOIN_TOKEN",
        hide_env_values = true
    )]
    token: String,
    /// Digest of the key of the cluster's CA, sha256:...
    #[arg(long, value_name = "HASH")]
    ca_hash: CaHash,
    /// The node's name [default: the host's]
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
    /// Where the credentials go
    #[arg(long, value_name = "DIR", default_value = CREDENTIALS)]
    credentials: PathBuf,
}

#[derive(Subcommand)]
enum Image {
    /// Import an OCI layout, an OCI archive or a docker-save archive
    Import {
        /// Directory or tar file
        path: PathBuf,
    },
    /// List what is here
    #[command(visible_alias = "list")]
    Ls,
    /// Get an image from its registry, or from a mirror of it
    Pull {
        /// As a pod would name it
        name: String,
    },
    /// Take a name away; with its last one the image goes
    Rm {
        /// As a pod would name it
        name: String,
    },
    /// Remove all images that no container uses, except pinned ones
    Prune,
    /// Keep an image whatever happens to the disk
    Pin {
        /// As a pod would name it
        name: String,
        /// No longer
        #[arg(long)]
        off: bool,
    },
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() {
                EXIT_USAGE.into()
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let filter =
        tracing_subscriber::EnvFilter::try_from_env("GANTRY_LOG").unwrap_or_else(
            |_| match arguments.command {
                Command::Run(_) => "info".into(),
                _ => "warn".into(),
            },
        );
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    if let Command::Run(_) = arguments.command
        && let Err(error) = memory::begin_without_thread_caches()
    {
        tracing::warn!("cannot begin without caches of threads, which cost memory: {error}");
    }
    memory::limit_arenas();
    // Their words are for who ran them, and become an event's: no log line around them.
    let is_helper = matches!(arguments.command, Command::MountNfs(_) | Command::Join(_));
    let done = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        // What a thread keeps (its stack, freed memory for its next use) ends with it; a burst of
        // pods needs dozens, what comes every ten seconds a few.
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .context("start the async runtime")
        .and_then(|runtime| match arguments.command {
            Command::Run(run) => runtime.block_on(agent(*run)),
            Command::Join(join) => runtime.block_on(join_cluster(join)),
            Command::Image(command) => runtime.block_on(image(command)),
            Command::Check => {
                let findings = check::judge(&check::Facts::read(&paths()?.lib));
                print!("{}", check::render(&findings));
                anyhow::ensure!(
                    check::is_usable(&findings),
                    "this machine cannot run Gantry"
                );
                Ok(())
            }
            Command::Shutdown => runtime
                .block_on(shutdown::ask(&paths()?, |words| println!("{words}")))
                .map_err(anyhow::Error::msg),
            Command::MountNfs(mount) => nfs::mount_here(&mount).map_err(anyhow::Error::msg),
            Command::Cleanup => runtime.block_on(cleanup::run(&paths()?)),
        });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_helper => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn join_cluster(arguments: Join) -> Result<()> {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let node = match arguments.node_name {
        Some(name) => name,
        None => host_name()?,
    };
    let machine_id = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let joined = join::join(&join::Join {
        server: arguments.server,
        token: arguments.token,
        ca_hash: arguments.ca_hash,
        node,
        credentials: arguments.credentials,
        machine_id: machine_id.trim().to_owned(),
        incarnation: join::incarnation(&paths()?.lib),
    })
    .await?;
    let end = jiff::Timestamp::from_second(joined.not_after_s)?;
    let (node, server) = (joined.node, joined.server);
    match joined.before {
        true => {
            println!("this machine is node {node} of {server} already (certificate until {end})")
        }
        false => println!(
            "joined {server} as node {node} (certificate until {end}, renewed by the agent)"
        ),
    }
    Ok(())
}

fn host_name() -> Result<String> {
    Ok(nix::unistd::gethostname()?.to_string_lossy().to_lowercase())
}

async fn image(command: Image) -> Result<()> {
    let paths = paths()?;
    match command {
        Image::Import { path } => image_command::import(&paths, &path).await,
        Image::Ls => image_command::list(&paths).await,
        Image::Pull { name } => image_command::pull(&paths, &name).await,
        Image::Rm { name } => image_command::remove(&paths, &name).await,
        Image::Prune => image_command::prune(&paths).await,
        Image::Pin { name, off } => image_command::pin(&paths, &name, !off).await,
    }
}

fn paths() -> Result<Paths> {
    let own = std::env::current_exe().context("where is this binary?")?;
    Ok(Paths::standard(
        own.parent().context("this binary lies nowhere")?.to_owned(),
    ))
}

/// Logging and flags are done: build everything, be ready, wait for a signal, drain.
async fn agent(run: Run) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        anyhow::bail!("pods need root: run gantry-agent as root");
    }
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("a TLS provider is installed twice"))?;
    let node_name = match run.node_name {
        Some(name) => name,
        None => match credentials::node_name(&run.credentials) {
            Some(name) => name,
            None => host_name()?,
        },
    };
    let server = run.server.or_else(|| credentials::server(&run.credentials));
    let server = server.unwrap_or_else(|| "https://127.0.0.1:6443".to_owned());
    check_unsafe_sysctls(&run.allowed_unsafe_sysctls)
        .map_err(|words| anyhow::anyhow!("--allowed-unsafe-sysctls: {words}"))?;
    let periods = run.resources.shutdown();
    periods.check().map_err(anyhow::Error::msg)?;
    let (pod_link, pods_max) = (run.network.pod_link, run.resources.max_pods);
    room::check(pods_max, pod_link).map_err(anyhow::Error::msg)?;
    let masquerade = run.network.masquerade(run.standalone_pod_cidr);
    let masquerade = masquerade.map_err(anyhow::Error::msg)?;
    open_files::raise();
    let paths = paths()?;
    let shutdown = CancellationToken::new();
    run_directory::ensure(&paths.run)
        .with_context(|| format!("tmpfs on {}", paths.run.display()))?;
    orlov::ensure_apart(&[&paths.lib, &paths.pods_lib(), &paths.log])
        .with_context(|| format!("directories below {}", paths.lib.display()))?;

    let capacity = node_info::capacity(run.resources.max_pods);
    let policy = run.resources.policy(&capacity, node_info::pid_max());
    let cgroups = Arc::new(Cgroups::detect(policy).context("cgroups")?);
    cgroups.ensure_root().await.context("cgroups")?;
    let runtime: Arc<dyn Runtime> = Arc::new(ShimRuntime::new(paths.clone()));
    let found = runtime.list().await.context("what runs already")?;
    info!(sandboxes = found.len(), "adopting");
    let registries = Registries::read(Path::new(image_command::REGISTRIES))
        .map_err(|words| anyhow::anyhow!("{words}"))?;
    let images = ImageStore::open_with(&paths.lib, registries).context("image store")?;
    let images = Arc::new(images);
    let import = paths.lib.join("import");
    let resolver = dns::ResolverConfig::standard(dns::HoldConfig::standard(&paths));
    let options = Options {
        node: node_name.clone(),
        resolver: Some(resolver.listen),
        masquerade,
        xdp: run.network.xdp,
        fast_path: run.network.fast_path,
    };
    if let Err(error) = reserve_ports(&paths.run) {
        warn!("pods and node may take the same port to the outside: {error}");
    }
    let dataplane: Arc<dyn Dataplane> =
        Arc::new(dataplane(&paths, &cgroups, options).context("eBPF data plane")?);

    let host = Host {
        unsafe_sysctls: run.allowed_unsafe_sysctls,
        ..Host::detect()
    };
    let (routes_shown, routes) = watch::channel(Routes::default());
    let resources = NodeResources::new(run.resources, &node_name, &cgroups, &host, &paths);
    let wireguard = run.network.wireguard(&paths.lib).await;
    let key = wireguard.as_ref().and_then(|own| own.as_ref().ok());
    let resources = resources
        .with_routes(routes.clone())
        .with_wireguard_key(key.map(OwnKey::text));
    for sentence in resources.degraded() {
        warn!("limits: {sentence}");
    }
    let devices = DevicePlugins::open(&run.device_plugins, &paths, shutdown.clone());
    let node_info = resources.info(&devices.amounts(), &dataplane);
    let host_addresses = pods::node_addresses(&node_info());
    let config = feed::Config::new(server, run.credentials, node_name.clone(), &paths);
    let mirrors = static_pods::Mirrors::default();
    let target = Arc::new(PodTunnels::new(
        paths.clone(),
        runtime.clone(),
        ImageStore::clone(&images),
        resources.usage(),
        mirrors.clone(),
        dataplane.clone(),
    ));
    let mut link =
        feed::run(config, node_info, target.clone(), shutdown.clone()).context("feed")?;
    (link.view, link.link) = static_pods::run(
        static_pods::Config {
            directory: run.static_pods,
            node: node_name.clone(),
            standalone_pod_cidr: run.standalone_pod_cidr,
            mirrors,
        },
        paths.clone(),
        link.reporter.clone(),
        link.view,
        link.link,
        shutdown.clone(),
    );
    let services = pods::hold::services(
        &paths.run,
        link.view.clone(),
        link.link.clone(),
        shutdown.clone(),
    );
    target.follow(&node_name, link.view.clone());

    let follow_near = follow_near(dataplane.clone(), routes.clone(), shutdown.clone());
    let network = PodNetworks::new(
        paths.clone(),
        NetworkConfig {
            routes,
            link: pod_link,
            ..NetworkConfig::standard(host_addresses.clone())
        },
        link.view.clone(),
        dataplane.clone(),
    );
    let packet_size = network.follow_packet_size(shutdown.clone());
    let health_checks = health_check::run(
        node_name.clone(),
        host_addresses.clone(),
        services.clone(),
        shutdown.clone(),
    );
    let uplinks = follow_uplinks(dataplane.clone(), host_addresses.clone(), shutdown.clone());
    let follow_routes = follow_routes(
        run.network.routing(&node_name, &host_addresses, wireguard),
        paths.run.clone(),
        link.view.clone(),
        routes_shown,
        shutdown.clone(),
    );
    let unified = cgroups.layout().unified().filter(|_| cgroups.is_v2());
    let device_guard = unified.map(|root| pods::DeviceGuard {
        dataplane: dataplane.clone(),
        root: root.to_owned(),
    });
    let csi = CsiDrivers::new(&paths);
    let follower = node_name.clone();
    let node = Arc::new(pods::Node {
        name: node_name,
        host_addresses,
        host,
        paths,
        runtime,
        network: Arc::new(network),
        images: images.clone(),
        cgroups,
        allocatable: resources.allocatable(),
        going_down: resources.going_down().subscribe(),
        devices: devices.clone(),
        csi: csi.clone(),
        device_guard,
        second_looks: tokio::sync::Semaphore::new(pods::SECOND_LOOK_COUNT_MAX),
        probes: Arc::default(),
        reporter: link.reporter.clone(),
        tokens: Arc::new(link.tokens),
    });
    let log_runtime = node.runtime.clone();
    let tasks = tokio_util::task::TaskTracker::new();
    let store = ImageStore::clone(&node.images);
    tasks.spawn(drop_in::watch(store.clone(), import, shutdown.clone()));
    tasks.spawn(keep_disk_free(store, link.view.clone(), shutdown.clone()));
    let resolver = dns::Resolver::start(resolver, link.view.clone(), shutdown.clone()).await?;
    let resources = resources.with_names(resolver.metrics());
    let going_down = resources.going_down();
    let (order, orders) = resources.watch(&images, &link.view, &dataplane, &tasks, &shutdown);
    let listener = shutdown::listen(&node.paths).context("the agent's socket")?;
    tasks.spawn(policy::follow::follow(
        dataplane.clone(),
        link.view.clone(),
        order.clone(),
        shutdown.clone(),
    ));
    let down = Shutdown {
        periods,
        going_down,
        view: link.view.clone(),
        orders: order,
        runtime: node.runtime.clone(),
        reporter: link.reporter.clone(),
        paths: node.paths.clone(),
    };
    tasks.spawn(down.serve(listener, shutdown.clone()));
    let (mut offered, beat) = (devices.amounts(), link.reporter.clone());
    tasks.spawn(devices.serve());
    tasks.spawn(csi.serve(shutdown.clone()));
    let stop = shutdown.clone();
    tasks.spawn(async move {
        // Cancel-safe: both only wait.
        while let Some(Ok(())) = stop.run_until_cancelled(offered.changed()).await {
            beat.beat();
        }
    });
    let hold = Hold::new(link.link, pods::hold::PATIENCE);
    let workers = PodWorkers::new(node, link.view.clone(), found, orders, hold);
    tasks.spawn(workers.run(shutdown.clone()));
    tasks.spawn(uplinks);
    tasks.spawn(follow_routes);
    tasks.spawn(follow_near);
    tasks.spawn(packet_size);
    tasks.spawn(room::follow(pods_max, link.view.clone(), shutdown.clone()));
    tasks.spawn(look_after_backends(
        follower.clone(),
        dataplane.clone(),
        services.clone(),
        link.reporter.clone(),
        shutdown.clone(),
    ));
    tasks.spawn(look_after_neighbours(
        dataplane.clone(),
        link.view.clone(),
        shutdown.clone(),
    ));
    tasks.spawn(health_checks);
    tasks.spawn(follow(
        follower,
        dataplane,
        services,
        link.reporter,
        shutdown.clone(),
    ));
    let limits = Limits {
        bytes_max: run.container_log_max_size,
        file_count_max: usize::try_from(run.container_log_max_files)?,
    };
    tasks.spawn(memory::give_back(memory::INTERVAL, shutdown.clone()));
    tasks.spawn(pods::rotation::run(log_runtime, limits, shutdown.clone()));
    let manager = Arc::new(ServiceManager::from_environment());
    tasks.spawn(keep_alive(manager.clone(), shutdown.clone()));
    tasks.close();
    info!("ready");
    manager.ready("pods and Services run");

    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        // Cancel-safe: both only wait for a signal.
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    info!("stopping; pods and Services go on without the agent");
    manager.stopping();
    shutdown.cancel();
    let drained = async { tokio::join!(tasks.wait(), resolver.ended()) };
    if tokio::time::timeout(DRAIN, drained).await.is_err() {
        warn!("some parts did not end within {} s", DRAIN.as_secs());
    }
    Ok(())
}

/// Tells the service manager that this runtime still gets its turns.
async fn keep_alive(manager: Arc<ServiceManager>, shutdown: CancellationToken) {
    let Some(interval) = manager.interval() else {
        return;
    };
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // Cancel-safe: a tick that is not taken comes again.
    while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
        manager.alive();
    }
}

/// Loads and attaches the programs; on a pure v2 machine also the device rules of all pods.
fn dataplane(paths: &Paths, cgroups: &Cgroups, options: Options) -> Result<BpfDataplane> {
    let unified = cgroups.layout().unified().context(
        "cgroup v2 is not mounted, and Services need it. Run:\n  mkdir -p /sys/fs/cgroup/unified && \
         mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified",
    )?;
    let dataplane = BpfDataplane::start(paths, unified, options)?;
    if cgroups.is_v2() {
        dataplane.attach_device_guard(&unified.join("gantry"))?;
    }
    Ok(dataplane)
}

/// Programs every new view, then acknowledges it.
async fn follow(
    node: String,
    dataplane: Arc<dyn Dataplane>,
    mut view: watch::Receiver<Arc<View>>,
    reporter: Reporter,
    shutdown: CancellationToken,
) {
    let mut retry = Duration::from_millis(100);
    let mut full = FullMaps::new(node);
    view.mark_changed();
    loop {
        tokio::select! {
            // Cancel-safe: both only wait.
            () = shutdown.cancelled() => return,
            changed = view.changed() => if changed.is_err() { return },
        }
        let newest = view.borrow_and_update().clone();
        match dataplane.apply(&newest).await {
            Ok(stuck) => {
                full.look(&*dataplane, &reporter);
                tokio::time::sleep(SYN_IN_FLIGHT).await;
                reporter.programmed(newest.rev, stuck);
                retry = Duration::from_millis(100);
            }
            Err(error) => {
                error!(rev = newest.rev, %error, "the data plane does not follow; trying again");
                tokio::time::sleep(retry).await;
                retry = (retry * 2).min(Duration::from_secs(10));
                view.mark_changed();
            }
        }
    }
}
