//! Ways into a container's network namespace. There are many paths to one, and some end before it does:
//! `/proc/PID/ns/net` goes with its process.

use cirri_loader::net::Namespace;

use super::core::Core;
use super::endpoint::Endpoint;

impl Core {
    /// The namespace of a workload, by whatever path leads there: the one that is named now, that of its ADD, or those
    /// of its container's other attachments.
    pub fn way_into(&self, endpoint: &Endpoint, named: Option<&str>) -> Option<Namespace> {
        let beside = self.beside(endpoint).map(|other| other.netns.as_str());
        let paths = named.into_iter().chain([endpoint.netns.as_str()]).chain(beside);
        let opened = paths.filter_map(|path| Namespace::open(path).ok());
        // A path may lead to another one by now.
        opened.into_iter().find(|inside| inside.cookie().is_ok_and(|cookie| cookie == endpoint.netns_cookie))
    }

    /// The other attachments of a workload's container.
    pub fn beside<'a>(&'a self, endpoint: &'a Endpoint) -> impl Iterator<Item = &'a Endpoint> {
        self.endpoints.values().filter(|other| {
            other.netns_cookie == endpoint.netns_cookie && other.netns_cookie != 0 && other.id != endpoint.id
        })
    }
}
