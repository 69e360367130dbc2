//! The maps as a test writes and reads them, whether they are pinned or held by an object only.

use std::net::SocketAddr;

use aya::maps::{Array, HashMap, Map, MapData, MapType};
use ebpf_maps::flow::{FlowKey, FlowValue};
use ebpf_maps::services::{
    Addr, BACKEND_IN_USE, BACKEND_RETIRED, BackendValue, FrontendKey, FrontendValue, SCOPE_ADDRESS,
    SCOPE_NODE_PORT, mix,
};

use crate::services::index::addr_of;

/// Whoever has the maps.
pub(super) trait Maps {
    /// A map by its name, opened anew.
    fn data(&self, name: &str) -> MapData;

    fn hash<K: aya::Pod, V: aya::Pod>(&self, name: &str) -> HashMap<MapData, K, V> {
        let data = self.data(name);
        let map = match data.info().unwrap().map_type().unwrap() {
            MapType::LruHash => Map::LruHashMap(data),
            _ => Map::HashMap(data),
        };
        map.try_into().unwrap()
    }

    fn array<V: aya::Pod>(&self, name: &str) -> Array<MapData, V> {
        Map::Array(self.data(name)).try_into().unwrap()
    }

    /// A frontend with these backends, whose ids and slots begin at `base`; it is the Service of
    /// that id.
    fn serve(&self, frontend: &str, proto: u8, base: u32, backends: &[&str]) {
        self.serve_as(frontend, proto, SCOPE_ADDRESS, base, 0, backends);
    }

    /// A node port: at every address of the nodes.
    fn serve_node_port(&self, node: &str, frontend: &str, proto: u8, base: u32, backend: &str) {
        let node: std::net::IpAddr = node.parse().unwrap();
        let mut nodes = self.hash::<Addr, u32>("NODE_ADDRESSES");
        nodes.insert(addr_of(node), 1, 0).unwrap();
        self.serve_as(frontend, proto, SCOPE_NODE_PORT, base, 0, &[backend]);
    }

    fn serve_as(
        &self,
        frontend: &str,
        proto: u8,
        scope: u8,
        base: u32,
        affinity_s: u32,
        backends: &[&str],
    ) {
        assert!(base.is_multiple_of(2) && base > 0);
        let ids: Vec<u32> = (base..).take(backends.len()).collect();
        for (id, backend) in ids.iter().zip(backends) {
            let backend: SocketAddr = backend.parse().unwrap();
            let value = BackendValue {
                addr: addr_of(backend.ip()),
                port_be: backend.port().to_be(),
                proto,
                state: BACKEND_IN_USE,
                service_id: base,
                hash: mix(*id),
                ..BackendValue::default()
            };
            self.array::<BackendValue>("BACKENDS")
                .set(*id, value, 0)
                .unwrap();
        }
        for pair in ids.chunks(2) {
            let slots = [pair[0], pair.get(1).copied().unwrap_or(0)];
            let mut arena = self.array::<[u32; 2]>("SLOTS");
            arena.set(pair[0] / 2, slots, 0).unwrap();
        }
        let frontend: SocketAddr = frontend.parse().unwrap();
        let key = FrontendKey {
            addr: addr_of(frontend.ip()),
            port_be: frontend.port().to_be(),
            proto,
            scope,
        };
        let value = FrontendValue {
            check: key.check(),
            service_id: base,
            base,
            count: ids.len() as u32,
            affinity_s,
            ..FrontendValue::default()
        };
        let mut frontends = self.hash::<FrontendKey, FrontendValue>("FRONTENDS");
        frontends.insert(key, value, 0).unwrap();
    }

    /// A backend has left its Service.
    fn retire(&self, id: u32) {
        let mut backends = self.array::<BackendValue>("BACKENDS");
        let value = backends.get(&id, 0).unwrap();
        let retired = BackendValue {
            state: BACKEND_RETIRED,
            ..value
        };
        backends.set(id, retired, 0).unwrap();
    }

    /// All entries of FLOWS.
    fn flows(&self) -> Vec<(FlowKey, FlowValue)> {
        let flows = self.hash::<FlowKey, FlowValue>("FLOWS");
        flows.iter().map(Result::unwrap).collect()
    }

    /// Makes every flow this much older.
    fn age_flows(&self, ticks: u32) {
        let mut map = self.hash::<FlowKey, FlowValue>("FLOWS");
        for (key, value) in self.flows() {
            let older = FlowValue {
                used: value.used.wrapping_sub(ticks),
                ..value
            };
            map.insert(key, older, 0).unwrap();
        }
    }
}
