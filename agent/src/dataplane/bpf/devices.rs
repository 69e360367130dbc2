//! The device guard: which cgroups may open what beyond the standard devices.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;

use aya::maps::{HashMap, MapData, MapError};
use ebpf_maps::device::{BLOCK, CHARACTER, DeviceRuleKey, READ, WRITE};

use super::BpfDataplane;
use crate::dataplane::hooks::{self, DEVICE_HOOK};
use crate::dataplane::load::unexpected;
use crate::dataplane::{DataplaneError, DeviceRule};

impl BpfDataplane {
    /// Holds every process below `cgroup` (a cgroup v2 directory, `/gantry`) to the standard
    /// devices. Idempotent; survives the agent. For hosts without cgroup v1's device controller.
    pub fn attach_device_guard(&self, cgroup: &Path) -> Result<(), DataplaneError> {
        let program = self
            .device_guard
            .as_ref()
            .map_err(|reason| DataplaneError::Kernel {
                what: "device guard".into(),
                reason: reason.clone(),
            })?;
        hooks::attach(&self.paths, &DEVICE_HOOK, program.as_fd(), cgroup)
    }

    /// Lets a cgroup and all below it open any device: privileged pods. See [`cgroup_id`].
    pub fn exempt(&self, cgroup_id: u64) -> Result<(), DataplaneError> {
        let inserted = self.exempt_map().insert(cgroup_id, 1, 0);
        inserted.map_err(|error| unexpected("DEVICE_EXEMPT", error))
    }

    /// Takes an exemption back. Idempotent.
    pub fn remove_exemption(&self, cgroup_id: u64) -> Result<(), DataplaneError> {
        let mut exempt = self.exempt_map();
        if exempt.get(&cgroup_id, 0).is_err() {
            return Ok(());
        }
        exempt
            .remove(&cgroup_id)
            .map_err(|error| unexpected("DEVICE_EXEMPT", error))
    }

    fn exempt_map(&self) -> std::sync::MutexGuard<'_, HashMap<MapData, u64, u32>> {
        // A panic while holding it cannot leave a kernel map half-written.
        self.device_exempt
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn rules_map(&self) -> std::sync::MutexGuard<'_, HashMap<MapData, DeviceRuleKey, u32>> {
        // As above.
        self.device_rules
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Makes the devices of a cgroup exactly these.
    pub(super) fn set_rules(
        &self,
        cgroup_id: u64,
        rules: &[DeviceRule],
    ) -> Result<(), DataplaneError> {
        let key = |rule: &DeviceRule| DeviceRuleKey {
            cgroup_id,
            kind: if rule.is_block { BLOCK } else { CHARACTER },
            major: rule.major,
            minor: rule.minor,
            _pad: 0,
        };
        let mut map = self.rules_map();
        let failed = |error: MapError| unexpected("DEVICE_RULES", error);
        let wanted: BTreeMap<DeviceRuleKey, u32> = rules
            .iter()
            .map(|rule| {
                (
                    key(rule),
                    (u32::from(rule.read) * READ) | (u32::from(rule.write) * WRITE),
                )
            })
            .collect();
        let there: Vec<DeviceRuleKey> = map.keys().filter_map(Result::ok).collect();
        for old in there.iter().filter(|key| key.cgroup_id == cgroup_id) {
            if !wanted.contains_key(old) {
                map.remove(old).map_err(failed)?;
            }
        }
        for (key, access) in wanted {
            map.insert(key, access, 0).map_err(failed)?;
        }
        Ok(())
    }
}
