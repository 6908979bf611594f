# The part of nixpkgs' `lib` that this project's expressions use: same names, same meaning, nothing more.
let
  lib = builtins // rec {
    inherit (builtins)
      concatStringsSep
      filter
      isAttrs
      isFunction
      ;

    inherit (builtins) head listToAttrs sort;
    last = list: builtins.elemAt list (builtins.length list - 1);
    toList = value: if builtins.isList value then value else [ value ];
    hasInfix =
      infix: text:
      builtins.length (builtins.filter builtins.isString (builtins.split (escapeRegex infix) text)) > 1;
    escapeRegex = builtins.replaceStrings (charactersOf "\\[{()^$?*+|.") (
      map (c: "\\${c}") (charactersOf "\\[{()^$?*+|.")
    );
    charactersOf = text: builtins.genList (n: builtins.substring n 1 text) (builtins.stringLength text);
    versionAtLeast = a: b: builtins.compareVersions a b >= 0;
    concatMapStrings = f: list: concatStrings (map f list);
    mapAttrsRecursive =
      f:
      let
        at =
          path:
          builtins.mapAttrs (
            name: value: if isAttrs value then at (path ++ [ name ]) value else f (path ++ [ name ]) value
          );
      in
      at [ ];
    unique = builtins.foldl' (
      kept: item: if builtins.elem item kept then kept else kept ++ [ item ]
    ) [ ];
    genAttrs =
      names: f:
      builtins.listToAttrs (
        map (name: {
          inherit name;
          value = f name;
        }) names
      );
    filterAttrs =
      keep: set:
      builtins.removeAttrs set (filter (name: !keep name set.${name}) (builtins.attrNames set));
    nameValuePair = name: value: { inherit name value; };
    concatMapAttrs = f: set: builtins.foldl' (all: more: all // more) { } (mapAttrsToList f set);
    intersectAttrs = builtins.intersectAttrs;
    functionArgs = f: f.__functionArgs or (builtins.functionArgs f);
    mapAttrs' = f: set: builtins.listToAttrs (mapAttrsToList f set);
    optionalAttrs = cond: set: if cond then set else { };
    optionals = cond: items: if cond then items else [ ];
    optional = cond: item: if cond then [ item ] else [ ];
    optionalString = cond: text: if cond then text else "";
    concatStrings = concatStringsSep "";
    mapAttrsToList = f: set: map (name: f name set.${name}) (builtins.attrNames set);
    concatMapStringsSep =
      sep: f: list:
      concatStringsSep sep (map f list);
    isDerivation = value: value.type or null == "derivation";
    getBin = drv: drv.bin or drv;
    makeBinPath = concatMapStringsSep ":" (drv: "${getBin drv}/bin");
    getExe' = drv: name: "${getBin drv}/bin/${name}";
    # nixpkgs' says today that it guesses, and that it will not tomorrow.
    getExe =
      drv:
      getExe' drv (
        drv.meta.mainProgram
          or (throw "lib.getExe: ${drv.name} has no meta.mainProgram: name the program with lib.getExe'")
      );
    importTOML = path: builtins.fromTOML (builtins.readFile path);
    escapeShellArg = arg: "'${builtins.replaceStrings [ "'" ] [ "'\\''" ] (toString arg)}'";
    escapeShellArgs = concatMapStringsSep " " escapeShellArg;

    callPackageWith =
      scope: fn: args:
      let
        f = if isFunction fn then fn else import fn;
        wanted = builtins.functionArgs f;
        make = given: f (builtins.intersectAttrs wanted scope // given);
      in
      make args
      // {
        override = {
          __functor = _: more: make (args // more);
          __functionArgs = wanted;
        };
      };

    makeScope =
      newScope: f:
      let
        # All four are names in every scope of nixpkgs: an argument that is called like one is filled by it.
        self = f self // {
          newScope = scope: newScope (self // scope);
          callPackage = self.newScope { };
          overrideScope = more: makeScope newScope (final: f final // more final (f final));
          packages = f;
        };
      in
      self;

    # A file set is here two questions about a path: is it in the set, and is it a folder above one that is.
    fileset =
      let
        toSet =
          set:
          if isAttrs set then
            set
          else if !builtins.pathExists set then
            throw "lib.fileset: ${toString set} does not exist (git must know a new file)"
          else
            {
              has = path: path == toString set || hasPrefix "${toString set}/" path;
              above = path: hasPrefix "${path}/" (toString set);
            };
        none = {
          has = _: false;
          above = _: false;
        };
      in
      {
        maybeMissing = path: if builtins.pathExists path then toSet path else none;
        unions =
          sets:
          let
            all = map toSet sets;
          in
          {
            has = path: builtins.any (set: set.has path) all;
            above = path: builtins.any (set: set.above path) all;
          };
        difference = a: b: {
          has = path: (toSet a).has path && !(toSet b).has path;
          inherit (toSet a) above;
        };
        toSource =
          { root, fileset }:
          let
            set = toSet fileset;
          in
          {
            outPath = builtins.path {
              name = "source";
              path = root;
              filter = path: _type: set.has path || set.above path;
            };
          };
      };
    hasPrefix = prefix: text: builtins.substring 0 (builtins.stringLength prefix) text == prefix;
    hasSuffix =
      suffix: text:
      let
        end = builtins.stringLength text - builtins.stringLength suffix;
      in
      end >= 0 && builtins.substring end (-1) text == suffix;

    licenses = {
      asl20.spdxId = "Apache-2.0";
      gpl2Only.spdxId = "GPL-2.0-only";
    };
    platforms = {
      linux = [
        "x86_64-linux"
        "aarch64-linux"
      ];
      x86_64 = [ "x86_64-linux" ];
    };
  };
in
let
  all = lib // import ./modules.nix all;
in
all
