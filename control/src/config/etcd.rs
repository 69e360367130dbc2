//! The flags that say where etcd is.

use std::net::IpAddr;
use std::path::PathBuf;

use super::ConfigError;
use crate::store::{EtcdServers, EtcdTls};

/// See the module.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct EtcdArguments {
    /// Keep the store in etcd instead of the data directory; several control planes may have the same one:
    /// one is active, the others stand by
    #[arg(long, value_name = "etcd://HOST:PORT,...", value_parser = parse_store)]
    pub store: Option<EtcdPlaces>,

    /// The CA of etcd's certificates (PEM); needed unless all of etcd is on this machine
    #[arg(long, value_name = "FILE", requires = "store")]
    pub etcd_ca: Option<PathBuf>,

    /// The certificate for etcd (PEM)
    #[arg(long, value_name = "FILE", requires = "etcd_ca", requires = "etcd_key")]
    pub etcd_cert: Option<PathBuf>,

    /// The key of --etcd-cert (PEM)
    #[arg(long, value_name = "FILE", requires = "etcd_cert")]
    pub etcd_key: Option<PathBuf>,
}

/// The `HOST:PORT` of each of etcd's servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdPlaces(pub Vec<String>);

fn parse_store(text: &str) -> Result<EtcdPlaces, String> {
    let shape = "expected etcd://HOST:PORT,HOST:PORT,...";
    let rest = text.strip_prefix("etcd://").ok_or(shape)?;
    let is_place = |place: &&&str| {
        let parts = place.rsplit_once(':');
        parts.is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
    };
    let places: Vec<&str> = rest
        .split(',')
        .map(|place| place.strip_prefix("etcd://").unwrap_or(place))
        .collect();
    match places.iter().find(|place| !is_place(place)) {
        Some(place) => Err(format!("{place:?} is no HOST:PORT; {shape}")),
        None => Ok(EtcdPlaces(places.into_iter().map(str::to_owned).collect())),
    }
}

fn is_here(place: &str) -> bool {
    let host = place.rsplit_once(':').map_or("", |(host, _)| host);
    let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

impl EtcdArguments {
    /// Refuses to speak to another machine in clear.
    pub fn check(&self) -> Result<(), ConfigError> {
        let (Some(EtcdPlaces(places)), None) = (&self.store, &self.etcd_ca) else {
            return Ok(());
        };
        match places.iter().find(|place| !is_here(place)) {
            None => Ok(()),
            Some(place) => Err(ConfigError {
                flag: "--store",
                value: place.clone(),
                reason: "is another machine: give --etcd-ca, and what etcd asks for with --etcd-cert and \
                         --etcd-key"
                    .to_owned(),
            }),
        }
    }

    /// Where etcd is, if the store is there.
    pub fn servers(&self) -> Result<Option<EtcdServers>, ConfigError> {
        let Some(EtcdPlaces(places)) = &self.store else {
            return Ok(None);
        };
        self.check()?;
        let tls = match &self.etcd_ca {
            None => None,
            Some(ca) => Some(EtcdTls {
                ca: read("--etcd-ca", ca)?,
                client: match (&self.etcd_cert, &self.etcd_key) {
                    (Some(certificate), Some(key)) => {
                        Some((read("--etcd-cert", certificate)?, read("--etcd-key", key)?))
                    }
                    _ => None,
                },
            }),
        };
        let scheme = match &tls {
            Some(_) => "https",
            None => "http",
        };
        let urls = places.iter().map(|place| format!("{scheme}://{place}"));
        Ok(Some(EtcdServers {
            urls: urls.collect(),
            tls,
        }))
    }
}

fn read(flag: &'static str, path: &PathBuf) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|error| ConfigError {
        flag,
        value: path.display().to_string(),
        reason: format!("cannot be read: {error}"),
    })
}
