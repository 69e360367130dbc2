//! What is measured at one size: a bed for each layout, its servers and clients, and the lanes between
//! them.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::runtime::Runtime;

use super::bed::{self, Bed, NODE_ADDRESS, Namespace};
use super::figures::Case;
use super::gantry::Gantry;
use super::model::{Model, NODE_PORT, SERVICE_PORT, Service, TARGET_PORT};
use super::peer::Peer;
use super::{layout_iptables, layout_nft};

/// What translates addresses, if anything does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Layout {
    Direct,
    Gantry,
    IptablesNft,
    IptablesLegacy,
    Nftables,
}

impl Layout {
    pub(super) const ALL: [Self; 5] = [
        Self::Direct,
        Self::Gantry,
        Self::IptablesNft,
        Self::IptablesLegacy,
        Self::Nftables,
    ];

    /// As `--only` takes it, and a part of the names of its namespaces.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Gantry => "gantry",
            Self::IptablesNft => "iptables-nft",
            Self::IptablesLegacy => "iptables-legacy",
            Self::Nftables => "nftables",
        }
    }

    /// The case of what is not traffic: loading, memory, changes.
    pub(super) fn case(self) -> Case {
        match self {
            Self::Direct => Case::Direct,
            Self::Gantry => Case::Gantry,
            Self::IptablesNft => Case::IptablesNft,
            Self::IptablesLegacy => Case::IptablesLegacy,
            Self::Nftables => Case::Nftables,
        }
    }

    /// The program that loads it.
    pub(super) fn loader(self) -> Option<&'static [&'static str]> {
        match self {
            Self::Direct | Self::Gantry => None,
            Self::IptablesNft => Some(&["iptables-nft-restore", "-w", "5", "--noflush"]),
            Self::IptablesLegacy => Some(&["iptables-legacy-restore", "-w", "5", "--noflush"]),
            Self::Nftables => Some(&["nft", "-f", "-"]),
        }
    }
}

/// Up to so many Services iptables-nft-restore loads all of them as kube-proxy does it, with --noflush.
/// Version 1.8.9 then looks at all chains for each: 4 s of CPU with 2,000 Services, minutes with 10,000.
const NOFLUSH_COUNT_MAX: usize = 2_000;

/// A client and where it connects to.
pub(super) struct Lane {
    pub case: Case,
    pub address: String,
    /// Index in [`Stage::clients`].
    pub client: usize,
    /// Index in [`Stage::servers`].
    pub servers: usize,
}

/// A layout's part of the stage.
pub(super) struct Act {
    pub layout: Layout,
    pub bed: Bed,
    /// The lane whose client sees a change first.
    pub lane: Option<usize>,
    /// Gantry's.
    pub gantry: Option<Gantry>,
}

/// Everything at one size.
pub(super) struct Stage {
    pub model: Model,
    pub acts: Vec<Act>,
    pub lanes: Vec<Lane>,
    pub clients: Vec<Peer>,
    /// Those of one bed together.
    pub servers: Vec<Vec<Peer>>,
    _pair: [Namespace; 2],
}

/// Whoever measures, and whoever is measured, by processor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cpus {
    pub measured: usize,
    pub other: usize,
}

impl Stage {
    /// Builds it; nothing is loaded yet.
    pub(super) fn new(model: Model, layouts: &[Layout], cpus: Cpus) -> Result<Self> {
        let live = model.live();
        let (pair, pair_address) = bed::pair()?;
        let mut stage = Self {
            clients: vec![Peer::client(&pair[0], cpus.measured)?],
            servers: vec![vec![Peer::serve(&pair[1], cpus.measured)?]],
            lanes: vec![Lane {
                case: Case::Pair,
                address: bed::target(pair_address),
                client: 0,
                servers: 0,
            }],
            acts: Vec::new(),
            model,
            _pair: pair,
        };
        for layout in layouts {
            let filtered = layout.loader().is_some();
            let bed = Bed::new(layout.name(), &live, filtered)
                .with_context(|| format!("build the node of {}", layout.name()))?;
            let servers = bed.backends.iter();
            let servers = servers.map(|backend| Peer::serve(backend, cpus.measured));
            stage.servers.push(servers.collect::<Result<_>>()?);
            stage.acts.push(Act {
                layout: *layout,
                bed,
                lane: None,
                gantry: None,
            });
            stage.add_lanes(stage.acts.len() - 1, cpus)?;
        }
        // The floor again, after all others.
        let direct = stage.lanes.iter().find(|lane| lane.case == Case::Direct);
        let again = direct.map(|direct| Lane {
            case: Case::DirectAgain,
            address: direct.address.clone(),
            ..*direct
        });
        stage.lanes.extend(again);
        Ok(stage)
    }

    fn add_lanes(&mut self, act: usize, cpus: Cpus) -> Result<()> {
        let service = self.model.measured();
        let cluster_ip = format!("{}:{SERVICE_PORT}", service.address);
        let node_port = format!("{NODE_ADDRESS}:{NODE_PORT}");
        // The floor has as many servers as the Service, and chooses among them alike.
        let first = service.endpoints.first();
        let first = first.context("a Service without endpoints")?;
        let pod = format!("{first}*{}:{TARGET_PORT}", service.endpoints.len());
        let Act { layout, bed, .. } = &self.acts[act];
        let inside = self.clients.len();
        self.clients.push(Peer::client(&bed.client, cpus.measured)?);
        self.clients
            .push(Peer::client(&bed.outside, cpus.measured)?);
        let outside = inside + 1;
        let lanes = match layout {
            Layout::Direct => vec![
                (Case::Direct, pod.clone(), inside),
                (Case::Routed, pod, outside),
            ],
            Layout::Gantry => {
                let translated = Peer::client(&bed.client, cpus.measured)?;
                let _making = super::making();
                let cgroup = bed::cgroup()?;
                std::fs::create_dir_all(&cgroup)
                    .with_context(|| format!("create {}", cgroup.display()))?;
                translated.join(&cgroup)?;
                self.clients.push(translated);
                // In a pod of its own: a connection that is translated by packets and one that is not must
                // not have the same ports at the same backend while the flow of one is known.
                self.clients.push(Peer::client(&bed.second, cpus.measured)?);
                vec![
                    (Case::GantrySocket, cluster_ip.clone(), outside + 1),
                    (Case::GantryPacket, cluster_ip, outside + 2),
                    (Case::GantryNodePort, node_port, outside),
                    (Case::GantryPod, pod, inside),
                ]
            }
            Layout::IptablesNft => vec![
                (Case::IptablesNft, cluster_ip, inside),
                (Case::IptablesNftNodePort, node_port, outside),
            ],
            Layout::IptablesLegacy => vec![
                (Case::IptablesLegacy, cluster_ip, inside),
                (Case::IptablesLegacyNodePort, node_port, outside),
            ],
            Layout::Nftables => vec![
                (Case::Nftables, cluster_ip, inside),
                (Case::NftablesNodePort, node_port, outside),
            ],
        };
        if *layout != Layout::Direct {
            self.acts[act].lane = Some(self.lanes.len());
        }
        let servers = self.servers.len() - 1;
        let lanes = lanes.into_iter().map(|(case, address, client)| Lane {
            case,
            address,
            client,
            servers,
        });
        self.lanes.extend(lanes);
        Ok(())
    }
}

impl Act {
    /// Loads everything into empty tables; how long it took.
    pub(super) fn load(&mut self, runtime: &Runtime, model: &Model) -> Result<Duration> {
        match self.layout {
            Layout::Direct => Ok(Duration::ZERO),
            Layout::Gantry => {
                self.gantry = None;
                let mut gantry = Gantry::start()?;
                gantry.attach(&self.bed, &model.live())?;
                let took = gantry.load(runtime, model)?;
                self.gantry = Some(gantry);
                Ok(took)
            }
            Layout::IptablesNft if model.services.len() > NOFLUSH_COUNT_MAX => {
                let loader = self.loader_words()?;
                let fresh: Vec<&str> = loader
                    .iter()
                    .copied()
                    .filter(|word| *word != "--noflush")
                    .collect();
                self.feed(&fresh, &layout_iptables::whole(model))
            }
            Layout::IptablesNft | Layout::IptablesLegacy => {
                self.restore(&layout_iptables::whole(model))
            }
            Layout::Nftables => self.restore(&layout_nft::whole(model, NODE_ADDRESS)),
        }
    }

    /// Empties the tables again.
    pub(super) fn unload(&mut self) -> Result<()> {
        let node = &self.bed.node;
        match self.layout {
            Layout::Direct | Layout::Gantry => {}
            Layout::Nftables => drop(node.program(&["nft", "flush", "ruleset"], "")?),
            Layout::IptablesNft | Layout::IptablesLegacy => {
                // Without --noflush: rules and chains go that the text does not have.
                let program = self.layout.loader().and_then(|words| words.first());
                let program = program.context("no loader")?;
                let empty = "*filter\nCOMMIT\n*nat\nCOMMIT\n";
                node.program(&[program, "-w", "5"], empty)?;
            }
        }
        Ok(())
    }

    /// A change that is ready to be handed over: the measured Service as `to` has it.
    pub(super) fn change<'a>(
        &'a mut self,
        runtime: &'a Runtime,
        model: &Model,
        to: &Service,
    ) -> Result<Box<dyn FnOnce() -> Result<Duration> + 'a>> {
        let text = match self.layout {
            Layout::Direct => String::new(),
            Layout::Gantry => {
                let gantry = self.gantry.as_mut().context("nothing is loaded")?;
                let view = gantry.after(to)?;
                return Ok(Box::new(move || gantry.apply(runtime, view)));
            }
            Layout::IptablesNft | Layout::IptablesLegacy => layout_iptables::change(model, to),
            Layout::Nftables => layout_nft::change(to),
        };
        Ok(Box::new(move || self.restore(&text)))
    }

    fn restore(&self, text: &str) -> Result<Duration> {
        self.feed(self.loader_words()?, text)
    }

    fn loader_words(&self) -> Result<&'static [&'static str]> {
        self.layout.loader().context("no loader")
    }

    fn feed(&self, words: &[&str], text: &str) -> Result<Duration> {
        let began = Instant::now();
        self.bed.node.program(words, text)?;
        Ok(began.elapsed())
    }
}

/// Why a layout cannot be measured here; None: it can.
pub(super) fn missing(layout: Layout) -> Option<String> {
    let program = layout.loader()?.first()?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<_> = std::env::split_paths(&path).collect();
    directories.extend(["/usr/sbin", "/sbin"].map(Into::into));
    let found = directories.iter().any(|d| d.join(program).is_file());
    (!found).then(|| format!("{}: {program} is not installed", layout.name()))
}

/// kube-proxy's third mode.
pub(super) fn no_ipvs() -> String {
    let reason = match Path::new("/proc/net/ip_vs").exists() {
        true => "kube-proxy has deprecated it, and no kernel with it was at hand to write it for",
        false => "this kernel has no virtual servers (CONFIG_IP_VS)",
    };
    format!("ipvs: {reason}")
}

/// The range of numbers of these addresses, which follow each other.
pub(super) fn range(endpoints: &[Ipv4Addr]) -> Option<(u32, u32)> {
    let numbers = endpoints.iter().map(|endpoint| u32::from(*endpoint));
    Some((numbers.clone().min()?, numbers.max()? + 1))
}
