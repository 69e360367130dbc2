//! A data plane that only remembers, for the tests of those who call it.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use gantry_api::proto;
use gantry_cni::uplinks::Uplink;
use tokio::sync::watch;

use super::{
    BackendChange, Counts, Dataplane, DataplaneError, DeviceRule, PodInterface, StuckService,
};
use crate::ids::PodUid;
use crate::policy::StuckPod;
use crate::services::announce::Watch;
use crate::services::liveness::Seen;
use crate::services::shown::Fill;
use crate::view::View;

/// The pods that are attached now.
#[derive(Default)]
pub struct FakeDataplane {
    pods: Mutex<BTreeMap<PodUid, PodInterface>>,
    prepared: Mutex<BTreeSet<u32>>,
}

impl FakeDataplane {
    /// How a pod is attached.
    pub fn pod(&self, pod: &PodUid) -> Option<PodInterface> {
        self.pods().get(pod).cloned()
    }

    /// Whether an interface got its programs before its pod.
    pub fn is_prepared(&self, ifindex: u32) -> bool {
        let prepared = self.prepared.lock();
        prepared
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&ifindex)
    }

    fn pods(&self) -> std::sync::MutexGuard<'_, BTreeMap<PodUid, PodInterface>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Dataplane for FakeDataplane {
    async fn apply(&self, _view: &View) -> Result<Vec<StuckService>, DataplaneError> {
        Ok(Vec::new())
    }

    async fn set_near(&self, _near: Option<&BTreeSet<IpAddr>>) -> Result<(), DataplaneError> {
        Ok(())
    }

    fn watched_nodes(&self) -> watch::Receiver<Option<Watch>> {
        watch::channel(None).1
    }

    async fn set_seen(&self, _seen: &Seen) -> Result<(), DataplaneError> {
        Ok(())
    }

    fn apply_policies(&self, _view: &View) -> Result<Vec<StuckPod>, DataplaneError> {
        Ok(Vec::new())
    }

    async fn services(
        &self,
        _request: &proto::ServicesRequest,
    ) -> Result<Vec<proto::ProgrammedService>, DataplaneError> {
        Ok(Vec::new())
    }

    fn fill(&self) -> Vec<Fill> {
        Vec::new()
    }

    fn sockets_ended(&self) -> u64 {
        0
    }

    fn prepare_interface(&self, ifindex: u32) -> Result<(), DataplaneError> {
        self.prepared
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(ifindex);
        Ok(())
    }

    fn counts(&self) -> Result<Counts, DataplaneError> {
        Ok(Counts::default())
    }

    async fn look_at_failures(&self) -> Result<Vec<BackendChange>, DataplaneError> {
        Ok(Vec::new())
    }

    fn ejections(&self) -> [u64; 2] {
        [0; 2]
    }

    fn attach_pod(&self, pod: &PodInterface) -> Result<(), DataplaneError> {
        self.pods().insert(pod.pod.clone(), pod.clone());
        Ok(())
    }

    fn detach_pod(&self, pod: &PodUid) -> Result<(), DataplaneError> {
        self.pods().remove(pod);
        Ok(())
    }

    fn retain_pods(&self, live: &HashSet<PodUid>) -> Result<(), DataplaneError> {
        self.pods().retain(|pod, _| live.contains(pod));
        Ok(())
    }

    fn set_uplinks(&self, _uplinks: &[Uplink]) -> Result<(), DataplaneError> {
        Ok(())
    }

    fn exempt_devices(&self, _cgroup: &Path) -> Result<(), DataplaneError> {
        Ok(())
    }

    fn allow_devices(&self, _cgroup: &Path, _rules: &[DeviceRule]) -> Result<(), DataplaneError> {
        Ok(())
    }

    fn end_device_exemption(&self, _cgroup: &Path) -> Result<(), DataplaneError> {
        Ok(())
    }
}
