//! Attachments made in advance: all of a pod's network but the pod.
//!
//! A ready set of namespaces is added to the network under a container id of its own, with a lease,
//! addresses, routes and packet programs. The pod that takes it writes that id into its record, so
//! nothing is renamed; until then nothing passes (`INTERFACES` has no row of it).
//!
//! Invariant: of the leases under such an id, those that are in no record and not [`held`] belong to
//! an agent that has ended, and `retain` gives them back; their links went with that agent's
//! descriptors.
//!
//! [`held`]: super::pool::Pool::is_held

use std::path::PathBuf;
use std::sync::Arc;

use gantry_cni::bridge;
use gantry_cni::config::{BridgeNetwork, PodLink};
use gantry_cni::ipam::Owner;
use gantry_cni::netlink::Netlink;
use gantry_cni::netns::Netns;
use gantry_cni::result::Attached;
use ipnet::IpNet;
use tokio::sync::watch;

use super::chain::{self, IFNAME};
use super::pod_networks::{addresses_of, from_cni, lease_dir};
use super::{NetworkError, Routes, forwarding};
use crate::dataplane::Dataplane;
use crate::paths::Paths;
use crate::view::View;

/// A finished attachment.
#[derive(Debug)]
pub(super) struct Wires {
    /// CNI_CONTAINERID of its ADD.
    pub container: String,
    /// The node's pod prefixes at that time.
    pub prefixes: Vec<IpNet>,
    pub attached: Attached,
}

/// A name that no attachment of this boot has.
pub(super) fn new_container() -> String {
    format!("ready-{:016x}", rand::random::<u64>())
}

/// A container of the bridge.
pub(super) fn owner(container: &str) -> Owner {
    Owner {
        container_id: container.into(),
        ifname: IFNAME.into(),
    }
}

/// What it takes to make attachments.
pub(super) struct Wirer {
    pub paths: Paths,
    pub conf_dir: PathBuf,
    pub view: watch::Receiver<Arc<View>>,
    pub dataplane: Arc<dyn Dataplane>,
    pub routes: watch::Receiver<Routes>,
    /// How new pods are attached.
    pub link: PodLink,
}

impl Wirer {
    /// What our bridge would give a pod now; none: a third party wires pods, or the node has no
    /// prefix yet.
    pub(super) fn prefixes(&self) -> Option<Vec<IpNet>> {
        match chain::load(&self.conf_dir) {
            Ok(list) if list.as_ref().is_none_or(chain::NetworkList::is_ours) => {
                let prefixes: Vec<IpNet> = self.view.borrow().settings.pod_cidrs().collect();
                (!prefixes.is_empty()).then_some(prefixes)
            }
            _ => None,
        }
    }

    /// * `link` – of a pod that is attached already: how it was.
    pub(super) fn network(
        &self,
        prefixes: &[IpNet],
        link: PodLink,
    ) -> Result<BridgeNetwork, NetworkError> {
        let network = BridgeNetwork::new(prefixes, lease_dir(&self.paths)).map_err(from_cni)?;
        Ok(BridgeNetwork {
            mtu: self.routes.borrow().mtu,
            link,
            ..network
        })
    }

    /// ADD for namespaces that wait for a pod.
    pub(super) async fn wire(
        &self,
        netns: &Netns,
        container: String,
        prefixes: Vec<IpNet>,
    ) -> Result<Wires, NetworkError> {
        let network = self.network(&prefixes, self.link)?;
        forwarding::ensure(&self.paths.run, &network)?;
        let host = Netlink::open().map_err(from_cni)?;
        let attached = bridge::add(&host, &network, &owner(&container), netns).await;
        let wires = Wires {
            container,
            prefixes,
            attached: attached.map_err(from_cni)?,
        };
        let (dataplane, index) = (self.dataplane.clone(), wires.attached.host_ifindex);
        let prepared = tokio::task::spawn_blocking(move || dataplane.prepare_interface(index));
        let error = match prepared.await {
            Ok(Ok(())) => return Ok(wires),
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        self.unwire(wires).await;
        Err(NetworkError::Packets(error))
    }

    /// DEL. What it cannot do, the next agent's `retain` does.
    pub(super) async fn unwire(&self, wires: Wires) {
        let removed = async {
            let network = self.network(&wires.prefixes, self.link)?;
            let host = Netlink::open().map_err(from_cni)?;
            let had = addresses_of(&wires.attached);
            let owner = owner(&wires.container);
            let removed = bridge::remove(&host, &network, &owner, &had).await;
            removed.map_err(from_cni)
        };
        if let Err(error) = removed.await {
            tracing::warn!(container = wires.container, %error, "remove an attachment in waiting");
        }
    }
}
