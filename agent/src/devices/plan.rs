//! Which devices there are, who has which, and which a container gets. Pure.
//!
//! Invariants: a device is held by one container at a time, but for an init container's, which the
//! pod's later containers take over; what is held stays held, whatever becomes of the device, until
//! the pod goes; a container that asks again gets what it has.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// Devices of one resource; more are left out.
pub const DEVICE_COUNT_MAX: usize = 4_096;

/// What a container gets with its devices.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Grant {
    /// Variables, below the container's own.
    pub env: BTreeMap<String, String>,
    /// Files and directories of the host.
    pub mounts: Vec<Mount>,
    /// Device nodes.
    pub nodes: Vec<Node>,
    /// Programs of the host that the container's making runs.
    pub hooks: Vec<Hook>,
}

/// A host path in the container.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Mount {
    /// Absolute.
    pub host_path: String,
    /// Absolute.
    pub container_path: String,
    /// Else writable.
    pub read_only: bool,
}

/// A device node of the host in the container.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Node {
    /// Where it is looked at when a container starts.
    pub host_path: String,
    /// Where it appears.
    pub container_path: String,
    /// Of `rwm`.
    pub permissions: String,
}

/// A program of the host, run as root while the container is made.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Hook {
    /// OCI's name of the moment: `createContainer`.
    pub moment: String,
    /// Absolute.
    pub path: String,
    /// With argument 0; empty: the path alone.
    pub args: Vec<String>,
    /// `NAME=value`, all that it gets.
    pub env: Vec<String>,
    /// It is killed after so many seconds, and the container is not made.
    pub timeout_s: u32,
}

impl Grant {
    /// Adds what another resource gives.
    pub fn add(&mut self, other: Self) {
        self.env.extend(other.env);
        for mount in other.mounts {
            if !self.mounts.contains(&mount) {
                self.mounts.push(mount);
            }
        }
        for node in other.nodes {
            if !self.nodes.contains(&node) {
                self.nodes.push(node);
            }
        }
        for hook in other.hooks {
            if !self.hooks.contains(&hook) {
                self.hooks.push(hook);
            }
        }
    }
}

/// One container's devices of one resource.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Held {
    /// The pod's UID.
    pub pod: String,
    /// The container's name.
    pub container: String,
    /// `vendor.example/kind`
    pub resource: String,
    /// The devices.
    pub ids: BTreeSet<String>,
    /// An init container's: the pod's later ones take it over.
    pub is_init: bool,
    /// What the plugin said about them.
    pub grant: Grant,
}

/// Everything about devices.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Devices {
    /// By resource: each device, and whether it is healthy.
    pub known: BTreeMap<String, BTreeMap<String, bool>>,
    /// Who has what.
    pub held: Vec<Held>,
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Asker<'a> {
    /// The pod's UID.
    pub pod: &'a str,
    /// The container's name.
    pub container: &'a str,
    /// It ends before the others start.
    pub is_init: bool,
}

/// What can be chosen from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice {
    /// Healthy and free, or the pod's own init container's.
    pub available: BTreeSet<String>,
    /// The init container's: taken first.
    pub must_include: BTreeSet<String>,
    /// How many.
    pub count: usize,
}

impl Devices {
    /// What this container has of a resource already.
    pub fn held_by(&self, asker: Asker<'_>, resource: &str) -> Option<&Held> {
        self.held.iter().find(|held| {
            held.pod == asker.pod && held.container == asker.container && held.resource == resource
        })
    }

    /// What it may get.
    ///
    /// # Errors
    /// In words, when there are too few.
    pub fn choice(&self, asker: Asker<'_>, resource: &str, count: usize) -> Result<Choice, String> {
        let Some(known) = self.known.get(resource) else {
            return Err(format!(
                "no device plugin has registered {resource} since the agent started"
            ));
        };
        let of_resource = || self.held.iter().filter(|held| held.resource == resource);
        let own_init: BTreeSet<&String> = of_resource()
            .filter(|held| held.is_init && held.pod == asker.pod)
            .flat_map(|held| &held.ids)
            .collect();
        let lasting: BTreeSet<&String> = of_resource()
            .filter(|held| !(held.is_init && held.pod == asker.pod))
            .flat_map(|held| &held.ids)
            .collect();
        let healthy = known.iter().filter(|(_, healthy)| **healthy);
        let available: BTreeSet<String> = healthy
            .map(|(id, _)| id)
            .filter(|id| !lasting.contains(id))
            .cloned()
            .collect();
        if available.len() < count {
            return Err(format!(
                "{count} of {resource} asked for, {} free and healthy of {}",
                available.len(),
                known.len()
            ));
        }
        let reused = own_init.into_iter().filter(|id| available.contains(*id));
        let must_include = reused.take(count).cloned().collect();
        Ok(Choice {
            available,
            must_include,
            count,
        })
    }

    /// Forgets pods that are gone; true when there were any.
    pub fn retain(&mut self, is_here: impl Fn(&str) -> bool) -> bool {
        let before = self.held.len();
        self.held.retain(|held| is_here(&held.pod));
        self.held.len() != before
    }

    /// Of each resource: how many there are, and how many of them are healthy.
    pub fn amounts(&self) -> BTreeMap<String, (usize, usize)> {
        let amounts = self.known.iter().map(|(resource, devices)| {
            let healthy = devices.values().filter(|healthy| **healthy).count();
            (resource.clone(), (devices.len(), healthy))
        });
        amounts.collect()
    }
}

/// The devices that are taken: what must be, what the plugin would rather have, the first others.
pub fn choose(choice: &Choice, preferred: &[String]) -> BTreeSet<String> {
    let preferred = preferred.iter().filter(|id| choice.available.contains(*id));
    let mut chosen = BTreeSet::new();
    for id in choice
        .must_include
        .iter()
        .chain(preferred)
        .chain(&choice.available)
    {
        if chosen.len() == choice.count {
            break;
        }
        chosen.insert(id.clone());
    }
    chosen
}

/// Whether this is the name of a resource that device plugins offer: `vendor.example/kind`.
pub fn is_extended(name: &str) -> bool {
    let Some((domain, kind)) = name.split_once('/') else {
        return false;
    };
    !domain.is_empty()
        && !kind.is_empty()
        && domain != "kubernetes.io"
        && !domain.ends_with(".kubernetes.io")
        && !name.starts_with("requests.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RESOURCE: &str = "example.com/thing";

    fn devices(count: usize) -> Devices {
        let ids = (0..count).map(|index| (format!("d{index}"), true));
        Devices {
            known: BTreeMap::from([(RESOURCE.to_owned(), ids.collect())]),
            held: Vec::new(),
        }
    }

    fn take(
        devices: &mut Devices,
        asker: Asker<'_>,
        count: usize,
    ) -> Result<BTreeSet<String>, String> {
        if let Some(held) = devices.held_by(asker, RESOURCE) {
            return Ok(held.ids.clone());
        }
        let choice = devices.choice(asker, RESOURCE, count)?;
        let ids = choose(&choice, &[]);
        devices.held.push(Held {
            pod: asker.pod.into(),
            container: asker.container.into(),
            resource: RESOURCE.into(),
            ids: ids.clone(),
            is_init: asker.is_init,
            grant: Grant::default(),
        });
        Ok(ids)
    }

    fn asker<'a>(pod: &'a str, container: &'a str, is_init: bool) -> Asker<'a> {
        Asker {
            pod,
            container,
            is_init,
        }
    }

    #[test]
    fn an_init_containers_devices_are_taken_over_and_nobody_elses() {
        let mut all = devices(2);
        let init = take(&mut all, asker("p", "i", true), 1).unwrap();
        assert_eq!(take(&mut all, asker("p", "m", false), 1).unwrap(), init);
        assert!(take(&mut all, asker("q", "m", false), 2).is_err());
        assert!(take(&mut all, asker("q", "m", false), 1).is_ok());
        // Asked again, a container has what it had.
        assert_eq!(take(&mut all, asker("p", "m", false), 1).unwrap(), init);
        let words = take(&mut all, asker("r", "m", false), 1).unwrap_err();
        assert!(words.contains("0 free and healthy of 2"), "{words}");
        assert!(all.retain(|pod| pod != "q"));
        all.known
            .get_mut(RESOURCE)
            .unwrap()
            .insert("d1".into(), false);
        assert_eq!(all.amounts()[RESOURCE], (2, 1));
        assert!(take(&mut all, asker("r", "m", false), 1).is_err());
        let unknown = all.choice(asker("r", "m", false), "example.com/none", 1);
        assert!(unknown.unwrap_err().contains("no device plugin"));
    }

    #[test]
    fn a_preference_counts_as_far_as_it_can() {
        let choice = devices(4)
            .choice(asker("p", "m", false), RESOURCE, 2)
            .unwrap();
        let preferred = ["d3".to_owned(), "unknown".to_owned()];
        let chosen: Vec<String> = choose(&choice, &preferred).into_iter().collect();
        assert_eq!(chosen, ["d0", "d3"]);
        for (name, is) in [
            ("example.com/x", true),
            ("cpu", false),
            ("kubernetes.io/x", false),
        ] {
            assert_eq!(is_extended(name), is, "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_device_is_held_twice(
            turns in proptest::collection::vec((0_u8..4, 0_u8..3, any::<bool>(), 0_usize..4, any::<bool>()), 0..30),
        ) {
            let mut all = devices(5);
            for (pod, container, is_init, count, goes) in turns {
                let (pod, container) = (format!("p{pod}"), format!("c{container}{is_init}"));
                if goes {
                    all.retain(|held| held != pod);
                } else if let Ok(ids) = take(&mut all, asker(&pod, &container, is_init), count) {
                    let before = all.held_by(asker(&pod, &container, is_init), RESOURCE);
                    prop_assert_eq!(&before.unwrap().ids, &ids);
                }
                let mut owners: BTreeMap<&String, BTreeSet<&String>> = BTreeMap::new();
                for held in &all.held {
                    for id in &held.ids {
                        owners.entry(id).or_default().insert(&held.pod);
                    }
                }
                // Never by two pods; by two containers of a pod only when one was an init container.
                prop_assert!(owners.values().all(|pods| pods.len() == 1));
                for (index, one) in all.held.iter().enumerate() {
                    for other in &all.held[index + 1..] {
                        let both = !one.is_init && !other.is_init;
                        prop_assert!(!both || one.ids.is_disjoint(&other.ids));
                    }
                }
            }
        }
    }
}
